_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    backbone=dict(
        type="PluginResNet",
        frozen_stages=0,  # layer1 trains: the weights of the base hold no attention
        plugins=[dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_conv2")],
    )
)
