# A detector that learns drawn scenes (tools/make_synthetic_coco.py) from random weights in minutes
# on a CPU. It expects them in `data_root`.
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])

model = dict(
    backbone=dict(
        type="PluginResNet",
        depth=18,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
        # "pytorch": as in the results that are written down
        plugins=[dict(cfg=dict(type="TripletAttention", init="pytorch"), position="after_conv2")],
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=128, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=128,
        feat_channels=128,
        anchor_generator=dict(scales=[1], base_sizes=[12, 24, 40, 64, 96]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128, fc_out_channels=512, num_classes=4),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100), rcnn=dict(max_per_img=50)),
)

data_root = "data/synthetic/"
metainfo = dict(classes=("person", "disk", "square", "triangle"))
scale = (128, 112)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=500, val_interval=500)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=500, milestones=[380, 460], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=0.04), clip_grad=dict(max_norm=10.0))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=250), logger=dict(interval=20))
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type="ExactResumeHook")]
randomness = dict(seed=0)
