# The demo's detector: smaller and plain. It learns scenes in which the color tells the class
# (tools/make_synthetic_coco.py --class-colors) in minutes on one CPU core.
_base_ = "faster-rcnn_r18-triplet_fpn_synthetic.py"

model = dict(
    backbone=dict(plugins=None),
    neck=dict(start_level=1, out_channels=64, num_outs=3),  # no object is smaller than 20 pixels
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(base_sizes=[24, 40, 64], strides=[8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[8, 16, 32], finest_scale=112),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=100), rcnn=dict(sampler=dict(num=32))),
)

data_root = "work_dirs/demo/scenes/"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=400, milestones=[320], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.001, weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
default_hooks = dict(checkpoint=dict(interval=200))
