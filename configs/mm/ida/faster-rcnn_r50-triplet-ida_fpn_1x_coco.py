_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
triplet = dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_conv3")
# layer3 and layer4, which are stages 4 and 5 of the network; there it comes after the gates
ida = dict(
    cfg=dict(type="IDABlock", warm_start=True),
    stages=(False, False, True, True),
    position="after_conv3",
)
model = dict(
    backbone=dict(
        type="PluginResNet",
        frozen_stages=0,  # layer1 trains: the weights of the base hold no attention
        plugins=[triplet, ida],
    )
)
