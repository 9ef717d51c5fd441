_base_ = "mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginConditionalDETR", batchformer=dict(insert_after=(0,)))
