# DeiT-Base with BatchFormerV2 on ImageNet-1k. Published (Hou et al., arXiv 2204.01254; README of
# github.com/zhihou7/BatchFormer), top-1 | top-5: 82.2 | 95.8; without BatchFormerV2 81.7 | 95.5.
#
# After the ninth layer, as in the authors' deit_share/.
_base_ = "mmpretrain::deit/deit-base_16xb64_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="BatchFormerImageClassifier", batchformer=dict(insert_after=(8,)))
train_dataloader = dict(sampler=dict(type="RepeatAugSampler"))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5),
]
