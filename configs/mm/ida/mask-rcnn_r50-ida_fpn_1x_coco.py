_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
# layer3 and layer4, which are stages 4 and 5 of the network
plugin = dict(
    cfg=dict(type="IDABlock", warm_start=True),
    stages=(False, False, True, True),
    position="after_conv3",
)
model = dict(backbone=dict(type="PluginResNet", plugins=[plugin]))
