_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
# layer3 and layer4, which are stages 4 and 5 of the network
plugin = dict(
    cfg=dict(type="IDABlock", warm_start=True),
    stages=(False, False, True, True),
    position="after_conv3",
)
model = dict(backbone=dict(type="PluginResNet", plugins=[plugin]))
