# No published number: a small training for one GPU.
_base_ = "./resnet101-ida_4xb32_coco2014-448px.py"
model = dict(
    backbone=dict(depth=50, init_cfg=dict(checkpoint="torchvision://resnet50")),
    head=dict(loss=dict(loss_weight=64 / 80)),
)


def smaller(pipeline):
    sizes = {"Resize": dict(scale=(224, 224)), "Cutout": dict(shape=112)}
    return [dict(step, **sizes.get(step["type"], {})) for step in pipeline]


train_pipeline = smaller(_base_.train_pipeline)
test_pipeline = smaller(_base_.test_pipeline)
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

epochs, warmup = 20, 4
rate, falling, rising = _base_.param_scheduler
param_scheduler = [
    dict(rate, pct_start=warmup / epochs, end=epochs),
    dict(falling, end=warmup),
    dict(rising, begin=warmup, end=epochs),
]
train_cfg = dict(max_epochs=epochs)
