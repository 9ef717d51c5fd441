_base_ = "mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginDABDETR", batchformer=dict(insert_after=(0,)))
