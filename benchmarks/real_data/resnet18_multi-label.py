# An image classifier for small real data, at which benchmarks/multi_label.py sets the data, the
# weights and the head. Training is that of configs/mmpretrain/ida, but short.
_base_ = ["mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet",
        depth=18,
        num_stages=4,
        out_indices=(3,),
        frozen_stages=2,
        init_cfg=dict(type="Pretrained", checkpoint=""),
    ),
)
data_preprocessor = dict(
    num_classes=0,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
    to_onehot=True,
)
size = 160
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(size, size), backend="pillow"),
    dict(type="PackInputs"),
]
train_pipeline = [
    *test_pipeline[:2],
    dict(type="Cutout", shape=size // 2, prob=1.0),
    dict(
        type="RandAugment",
        policies="timm_increasing",
        num_policies=2,
        magnitude_level=9,
        magnitude_std="inf",
        total_level=9,
    ),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoMultiLabel",
        data_root="",
        ann_file="train.json",
        data_prefix="images",
        pipeline=train_pipeline,
    ),
)
# Nothing is chosen by either split, so that both are evaluated.
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ConcatDataset",
        datasets=[
            dict(
                type="CocoMultiLabel",
                data_root="",
                ann_file=f"{split}.json",
                data_prefix="images",
                pipeline=test_pipeline,
                test_mode=True,
            )
            for split in ("val", "test")
        ],
    ),
)
val_evaluator = dict(type="MultiLabelBenchmark")
epochs = 12
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="Adam", lr=3e-4, weight_decay=1e-4),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = dict(
    type="OneCycleLR",
    eta_max=3e-4,
    pct_start=0.2,
    begin=0,
    end=epochs,
    convert_to_iter_based=True,
)
default_hooks = dict(
    logger=dict(interval=5),
    checkpoint=dict(interval=1, max_keep_ckpts=1),
)
