# MoCo v2 with BatchFormer, 200 epochs of ImageNet-1k. Published (Hou et al., CVPR 2022; README of
# github.com/zhihou7/BatchFormer), top-1 of linear evaluation: 68.4; without BatchFormer 67.5.
#
# As the authors' moco-v3/moco/builder_v2.py, whose projection has a layer more and batch norm.
# Their file cannot run as published: it gives a BatchFormer's constructor an argument too many.
_base_ = "mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="BatchFormerMoCo",
    neck=dict(
        type="NonLinearNeck",
        in_channels=2048,
        hid_channels=2048,
        out_channels=128,
        num_layers=3,
        with_bias=True,
        with_last_bn=False,
        with_last_bias=True,
        norm_cfg=dict(type="BN1d"),
        _delete_=True,
    ),
)
