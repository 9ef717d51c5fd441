# The 1x config, shrunk: small images and random weights, as nothing can be downloaded; twenty steps
# with a checkpoint after ten. The data's folder comes from the command line.
_base_ = "../../configs/mm/triplet_attention/faster-rcnn_r50-triplet_fpn_1x_coco.py"

model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=200), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(score_thr=0.0)),
)
resize = dict(type="Resize", scale=(266, 160), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    resize,
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=20, val_interval=20)
param_scheduler = [dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=5)]
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(max_norm=10.0))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10), logger=dict(interval=1))
log_processor = dict(by_epoch=False, window_size=1)
custom_hooks = [dict(type="ExactResumeHook")]
randomness = dict(seed=7)
