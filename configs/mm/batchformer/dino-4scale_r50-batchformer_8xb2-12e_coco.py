_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginDINO", batchformer=dict(insert_after=(0,)))
