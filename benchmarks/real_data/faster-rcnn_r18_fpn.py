"""The same Faster R-CNN with a ResNet-18 FPN at 192 pixels in MMDetection."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=18, frozen_stages=0),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=128),
    rpn_head=dict(
        in_channels=128,
        feat_channels=128,
        anchor_generator=dict(scales=[1], base_sizes=[16, 24, 40, 64, 128]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128, fc_out_channels=256),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
load = dict(type="LoadImageFromFile")
boxes = dict(type="LoadAnnotations", with_bbox=True)
resize = dict(type="Resize", scale=(320, 192), keep_ratio=True)
flip = dict(type="RandomFlip", prob=0.5)
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img="images/"),
        pipeline=[load, boxes, resize, flip, dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img="images/"),
        pipeline=[load, resize, boxes, dict(type="PackDetInputs", meta_keys=meta_keys)],
    ),
)
test_dataloader = val_dataloader
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=500, val_interval=500)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=500, milestones=[333, 450], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(type="value", clip_value=1.0))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=250), logger=dict(interval=20))
log_processor = dict(by_epoch=False)
