# A classifier that learns drawn images of one object (tools/make_synthetic_coco.py with
# --classification and --imbalance) from random weights in minutes on a CPU. It expects them in
# `data_root`.
_base_ = "mmpretrain::resnet/resnet18_8xb32_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    backbone=dict(type="PluginResNet", depth=10, stem_channels=32, base_channels=32),
    head=dict(in_channels=256, num_classes=7, topk=(1,)),
)
data_preprocessor = dict(num_classes=7)
data_root = "data/synthetic/classification"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(48, 48)),
    dict(type="RandomCrop", crop_size=48, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(48, 48)),
    dict(type="PackInputs"),
]
dataset = dict(type="CustomDataset", data_root=data_root, _delete_=True)
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_prefix="train", pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_prefix="val", pipeline=test_pipeline, **dataset),
)
test_dataloader = val_dataloader
custom_hooks = [dict(type="ClassCountsHook")]
val_evaluator = [dict(type="LongTailMetric")]
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=5e-4))
param_scheduler = dict(type="CosineAnnealingLR", T_max=30, eta_min=0, _delete_=True)
train_cfg = dict(max_epochs=30, val_interval=30)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=30))
