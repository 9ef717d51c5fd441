_base_ = "mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    backbone=dict(
        type="PluginMobileNetV2",
        # Initial gates as in the published MobileNetV2
        plugins=[
            dict(cfg=dict(type="TripletAttention", init="kaiming"), position="after_linear_conv")
        ],
    ),
    bbox_head=dict(type="PredictingSSDHead"),  # MMDetection 3.3's SSDHead fails in evaluation
)
