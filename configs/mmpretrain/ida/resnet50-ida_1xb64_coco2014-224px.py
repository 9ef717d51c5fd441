# No published number: a small training for one GPU.
_base_ = "./resnet101-ida_4xb32_coco2014-448px.py"
model = dict(
    backbone=dict(depth=50, init_cfg=dict(checkpoint="torchvision://resnet50")),
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
cycle = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type="OneCycleLR", eta_max=1e-4, pct_start=warmup / epochs, begin=0, end=epochs, **cycle),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, begin=0, end=warmup, **cycle),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=warmup, end=epochs, **cycle),
]
train_cfg = dict(max_epochs=epochs)
