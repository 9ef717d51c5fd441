_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginFasterRCNN",
    attention_mask_consistency=dict(mean_margin=0.1, max_margin=0.5),
)
