# DeiT-Small with BatchFormerV2 on ImageNet-1k. Published (Hou et al., arXiv 2204.01254; README of
# github.com/zhihou7/BatchFormer), top-1 | top-5: 80.4 | 95.2; without BatchFormerV2 79.8 | 95.0.
#
# After the ninth layer, as in the authors' deit_share/.
_base_ = "./deit-tiny-batchformerv2_4xb256_in1k.py"
model = dict(backbone=dict(arch="deit-small"), head=dict(in_channels=384))
