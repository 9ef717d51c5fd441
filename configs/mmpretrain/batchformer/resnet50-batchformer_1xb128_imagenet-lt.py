# ResNet-50 with BatchFormer and cross entropy on ImageNet-LT: the schedule of the authors'
# BalancedSoftmax/ folder. Their README (github.com/zhihou7/BatchFormer) has no number for this
# setting. The nearest, top-1 of all | many | medium | few: RIDE with 3 experts 53.6 | 64.9 | 50.4 |
# 33.2, with BatchFormer 54.1 | 64.3 | 51.4 | 35.1; PaCo 57.0 | 64.8 | 55.9 | 39.1, with BatchFormer
# 57.4 | 62.7 | 56.7 | 42.1.
#
# data/imagenet/meta has the field's lists ImageNet_LT_{train,val,test}.txt, whose paths are below
# data/imagenet. The authors test the epoch that is best on the val images.
_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
# The authors add the loss of each stream to that of both, which is three times the mean.
model = dict(
    backbone=dict(zero_init_residual=False),
    head=dict(type="BatchFormerClsHead", loss=dict(loss_weight=3.0)),
)
dataset = dict(type="CustomDataset", data_root="data/imagenet", _delete_=True)
train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4),
    _base_.train_pipeline[-1],
]
train_dataloader = dict(
    batch_size=128,
    drop_last=True,  # 905 steps are an epoch
    dataset=dict(ann_file="meta/ImageNet_LT_train.txt", pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(ann_file="meta/ImageNet_LT_val.txt", pipeline=_base_.test_pipeline, **dataset),
)
test_dataloader = dict(
    batch_size=128,
    dataset=dict(ann_file="meta/ImageNet_LT_test.txt", pipeline=_base_.test_pipeline, **dataset),
)
custom_hooks = [dict(type="ClassCountsHook")]
val_evaluator = [dict(type="Accuracy", topk=(1, 5)), dict(type="LongTailMetric")]
test_evaluator = val_evaluator
optim_wrapper = dict(
    optimizer=dict(lr=0.05, weight_decay=5e-4),
    paramwise_cfg=dict(custom_keys={"head.batchformer": dict(lr_mult=0.1)}),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=90, eta_min=0, _delete_=True)
train_cfg = dict(max_epochs=90)
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
auto_scale_lr = dict(base_batch_size=128)
