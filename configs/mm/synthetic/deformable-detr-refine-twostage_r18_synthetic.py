# A small Deformable DETR on drawn scenes, which it learns from random weights in minutes on a
# CPU: two levels, narrow stages, few layers and queries. Two stages need 256 channels.
_base_ = "faster-rcnn_r18-triplet_fpn_synthetic.py"

model = dict(
    _delete_=True,
    type="DeformableDETR",
    num_queries=30,
    num_feature_levels=2,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
    ),
    backbone=dict(
        type="PluginResNet",
        depth=18,
        stem_channels=32,
        base_channels=32,  # half the width
        out_indices=(2, 3),
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(
        type="ChannelMapper",
        in_channels=[128, 256],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=2,
    ),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_levels=2, batch_first=True),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512),
        ),
    ),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, batch_first=True),
            cross_attn_cfg=dict(embed_dims=256, num_levels=2, batch_first=True),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512),
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5),
    bbox_head=dict(
        type="DeformableDETRHead",
        num_classes=4,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=30),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(sampling_offsets=dict(lr_mult=0.1))),
)
train_cfg = dict(max_iters=1500, val_interval=1500)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=1500, milestones=[1125, 1375], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=500))
