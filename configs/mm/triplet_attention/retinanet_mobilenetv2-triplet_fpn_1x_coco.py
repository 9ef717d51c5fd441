_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="PluginMobileNetV2",
        # Strides 4, 8, 16 and 32, of which the base's neck leaves the first out. The last one is
        # conv2's 1280 channels and not layer7's 320: conv2 is built in any case, and parameters
        # without a gradient would stop a distributed training.
        out_indices=(1, 2, 4, 7),
        frozen_stages=0,  # conv1 only: the weights hold no attention
        norm_eval=True,  # as the base's ResNet
        plugins=[
            dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_linear_conv")
        ],
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://mmdet/mobilenet_v2"),
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
