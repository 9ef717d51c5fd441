_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginRetinaNet",
    attention_mask_consistency=dict(mean_margin=0.1, max_margin=0.5),
)
