# ResNet-32 with BatchFormer and cross entropy on CIFAR-100-LT, imbalance factor 100: the schedule
# of the authors' BalancedSoftmax/config/CIFAR100_LT/softmax_imba100.yaml. Their README has no
# number on CIFAR. They keep the epoch that is best on the test images, as this does.
_base_ = "mmpretrain::resnet/resnet50_8xb16_cifar100.py"
custom_imports = dict(imports=["mm_plugins"])
# The authors add the loss of each stream to that of both, which is three times the mean.
model = dict(
    backbone=dict(type="ThinResNet_CIFAR", depth=32, _delete_=True),
    head=dict(type="BatchFormerClsHead", in_channels=64, loss=dict(loss_weight=3.0)),
)
data_preprocessor = dict(mean=[125.307, 122.961, 113.8575], std=[51.5865, 50.847, 51.255])
train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(type="CIFARAutoAugment"),
    dict(type="Cutout", shape=16, pad_val=0, prob=1.0),
    _base_.train_pipeline[-1],
]
train_dataloader = dict(
    batch_size=512,
    drop_last=True,
    dataset=dict(type="CIFAR100LT", imbalance_factor=100, pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=512)
test_dataloader = val_dataloader
custom_hooks = [dict(type="ClassCountsHook")]
val_evaluator = [dict(type="Accuracy", topk=(1, 5)), dict(type="LongTailMetric")]
test_evaluator = val_evaluator
optim_wrapper = dict(
    optimizer=dict(lr=0.1, weight_decay=5e-4),
    paramwise_cfg=dict(custom_keys={"head.batchformer": dict(lr_mult=0.1)}),
)
# Their 13000 steps, and 800 of warm-up, are divided by 22 batches an epoch, the last of which is
# then left out: 591 epochs of 21 steps, 12411 in all, of which 777 warm up.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.5, end=37),
    dict(type="CosineAnnealingLR", T_max=554, eta_min=0, begin=37, end=591),
]
train_cfg = dict(max_epochs=591)
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
auto_scale_lr = dict(base_batch_size=512)
