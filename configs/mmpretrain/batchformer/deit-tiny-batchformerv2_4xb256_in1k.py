# DeiT-Tiny with BatchFormerV2 on ImageNet-1k. Published (Hou et al., arXiv 2204.01254; README of
# github.com/zhihou7/BatchFormer), top-1 | top-5: 72.7 | 91.5; without BatchFormerV2 72.2 | 91.1.
#
# As in the authors' deit_share/, `--insert_idx 8`: after the ninth layer. Their `--bt_lr` changes
# nothing without `--bt_decay`, which their command leaves out.
_base_ = "mmpretrain::deit/deit-tiny_4xb256_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="BatchFormerImageClassifier",
    batchformer=dict(insert_after=(8,)),
    backbone=dict(drop_path_rate=0.1),
)
train_dataloader = dict(sampler=dict(type="RepeatAugSampler"))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5),
]
