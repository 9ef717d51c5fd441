# Ten epochs from a plain classifier, in place of a hundred from random weights; not published
_base_ = "resnet50-triplet_8xb32_in1k.py"
layer = dict(type="TripletAttention", warm_start=True)  # the classifier starts as it was
model = dict(backbone=dict(plugins=[dict(cfg=layer, position="after_conv3")]))
load_from = "https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth"
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(_delete_=True, type="CosineAnnealingLR", by_epoch=True)
train_cfg = dict(max_epochs=10)
