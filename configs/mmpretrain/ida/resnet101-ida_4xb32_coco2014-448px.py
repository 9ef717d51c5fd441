# Paper (Liu et al., ICLR 2023), IDA-R101(L) at 448×448: 84.3 mAP; of all labels CF1 78.5, OF1 81.1;
# of the top 3 CF1 73.6, OF1 77.3. The training is that of the public reproduction
# (https://github.com/yu-gi-oh-leilei/IDA_2023ICLR, its README's command and lib_org_backbone),
# which also has --amp.
_base_ = ["mmpretrain::_base_/models/resnet101.py", "mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["mm_plugins"])
num_classes = 80
model = dict(
    backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")),
    neck=None,
    # A checkpoint of the reproduction needs sample_order="interleaved".
    head=dict(
        _delete_=True,
        type="IDAClsHead",
        num_classes=num_classes,
        in_channels=2048,
        # The reproduction's is a mean over the classes and a sum over a GPU's images, this one a
        # sum over the classes and a mean over the images. Adam adds the decay to its gradient.
        loss=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=32 / num_classes),
    ),
)
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
    to_onehot=True,
)

# RandAugment of the package randaugment 1.0.2: two of 15 operations, each with probability 1/2.
# There the level is a whole number from 1 to 9, here any up to 9. A small square that it cuts out
# stays 128, there 0.
operations = [
    dict(type="Invert"),
    dict(type="Cutout", magnitude_range=(0, 20)),
    dict(type="Sharpness", magnitude_range=(0, 0.9)),
    dict(type="AutoContrast"),
    dict(type="Posterize", magnitude_range=(8, 4)),
    dict(type="Shear", magnitude_range=(0, 0.3), direction="horizontal"),
    dict(type="Shear", magnitude_range=(0, 0.3), direction="vertical"),
    dict(type="Translate", magnitude_range=(0, 150 / 331), direction="horizontal"),
    dict(type="Translate", magnitude_range=(0, 150 / 331), direction="vertical"),
    # Counterclockwise alone
    dict(type="Rotate", magnitude_range=(0, -30), random_negative_prob=0.0),
    dict(type="Equalize"),
    dict(type="Contrast", magnitude_range=(0, 0.9)),
    dict(type="ColorTransform", magnitude_range=(0, 0.9)),
    dict(type="Solarize", magnitude_range=(256, 0)),
    dict(type="Brightness", magnitude_range=(0, 0.9)),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(448, 448), backend="pillow"),
    dict(type="PackInputs"),
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(448, 448), backend="pillow"),
    # There the square has a random colour, which Cutout has not.
    dict(type="Cutout", shape=224, prob=1.0),
    dict(
        type="RandAugment",
        policies=operations,
        num_policies=2,
        magnitude_level=9,
        magnitude_std="inf",
        total_level=9,
    ),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoMultiLabel",
        data_root="data/coco/",
        ann_file="annotations/instances_train2014.json",
        data_prefix="train2014",
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoMultiLabel",
        data_root="data/coco/",
        ann_file="annotations/instances_val2014.json",
        data_prefix="val2014",
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
val_evaluator = dict(type="MultiLabelBenchmark")
test_dataloader = val_dataloader
test_evaluator = val_evaluator

epochs, warmup = 80, 16
optim_wrapper = dict(
    optimizer=dict(type="Adam", lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-4),
    paramwise_cfg=dict(flat_decay_mult=0.0),  # biases and norms are not decayed
)
# torch.optim.lr_scheduler.OneCycleLR(max_lr=1e-4, pct_start=0.2), which also changes Adam's first
# beta: 0.95, 0.85, 0.95
cycle = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type="OneCycleLR", eta_max=1e-4, pct_start=warmup / epochs, begin=0, end=epochs, **cycle),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, begin=0, end=warmup, **cycle),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=warmup, end=epochs, **cycle),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
sync_bn = "torch"
default_hooks = dict(
    checkpoint=dict(save_best="multi-label/mAP", rule="greater", max_keep_ckpts=1),
)
# The average, of norms' statistics too, begins after the first step, there with the first weights.
# There the plain weights are evaluated too, and the better of both are kept.
custom_hooks = [
    dict(type="EMAHook", momentum=3e-4, update_buffers=True, priority="ABOVE_NORMAL"),
    dict(
        type="EarlyStoppingHook",
        monitor="multi-label/mAP",
        rule="greater",
        min_delta=0.0,
        patience=9,
    ),
]
