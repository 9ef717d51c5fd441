_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
# From the authors' ImageNet ResNet-50 with triplet attention, converted by
# tools/convert_checkpoint.py SOURCE resnet50_triplet_attention.pth --to mm
model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="TripletAttention"), position="after_conv3")],
        init_cfg=dict(type="Pretrained", checkpoint="resnet50_triplet_attention.pth"),
    )
)
