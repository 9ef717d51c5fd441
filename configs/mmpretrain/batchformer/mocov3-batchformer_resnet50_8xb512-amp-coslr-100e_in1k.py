# MoCo v3 with BatchFormer, 100 epochs of ImageNet-1k. Published (Hou et al., CVPR 2022; README of
# github.com/zhihou7/BatchFormer), top-1 of linear evaluation: 70.1; without BatchFormer 68.9.
#
# As the authors' moco-v3/ with `--add_bf 1`, where the BatchFormer keeps its random weights.
_base_ = "mmpretrain::mocov3/mocov3_resnet50_8xb512-amp-coslr-100e_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="BatchFormerMoCoV3", train_batchformer=False)
