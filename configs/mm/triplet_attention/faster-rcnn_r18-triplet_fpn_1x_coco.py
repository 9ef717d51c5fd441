_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    backbone=dict(
        type="PluginResNet",
        depth=18,
        frozen_stages=0,  # layer1 trains: the weights hold no attention
        plugins=[dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_conv2")],
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet18"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
