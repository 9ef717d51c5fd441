# A small Grounding DINO on drawn scenes and their phrases, which a CPU trains from random weights:
# a quarter of the width, few layers and queries, and a text model of tools/make_tiny_text_model.py.
# No flips: "left of" would become wrong. It has no auxiliary loss; the detector is a regularized
# one for the heatmaps of the pointing game.
_base_ = "faster-rcnn_r18-triplet_fpn_synthetic.py"

data_root = _base_.data_root
lang_model_name = "data/tiny-bert"

model = dict(
    _delete_=True,
    type="PluginGroundingDINO",
    heatmap=dict(in_test=True),
    num_queries=20,
    num_feature_levels=3,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    language_model=dict(
        type="BertModel",
        name=lang_model_name,
        max_tokens=64,
        pad_to_max=False,
        use_sub_sentence_represent=True,
        special_tokens_list=["[CLS]", "[SEP]", ".", "?"],
        add_pooling_layer=False,
    ),
    backbone=dict(
        type="PluginResNet",
        depth=50,
        stem_channels=32,
        base_channels=16,
        out_indices=(1, 2, 3),
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(
        type="ChannelMapper",
        in_channels=[128, 256, 512],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        bias=True,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=3,
    ),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_levels=3, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        text_layer_cfg=dict(
            self_attn_cfg=dict(num_heads=4, embed_dims=256, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        # From random weights the two sides have to meet at once: gates are half open.
        fusion_layer_cfg=dict(v_dim=256, l_dim=256, embed_dim=256, num_heads=4, init_values=0.5),
    ),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_text_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=3, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type="GroundingDINOHead",
        num_classes=4,
        sync_cls_avg_factor=True,
        contrastive_cfg=dict(max_text_len=64, log_scale="auto", bias=True),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="BinaryFocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=20),
)

meta_keys = (
    *("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    *("text", "custom_entities", "tokens_positive", "phrase_ids", "phrases"),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=_base_.scale, keep_ratio=True),
    dict(type="RandomSamplingNegPos", tokenizer_name=lang_model_name, max_tokens=64),
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=_base_.scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=4,
    batch_sampler=None,
    dataset=dict(
        _delete_=True,
        type="ODVGDataset",
        data_root=data_root,
        ann_file="annotations/grounding_train2017_odvg.jsonl",
        data_prefix=dict(img="train2017/"),
        return_classes=True,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="Flickr30kDataset",
        data_root=data_root,
        ann_file="annotations/grounding_val2017_flickr30k.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        return_classes=True,
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type="Flickr30kMetric", prefix="recall"),
    dict(
        type="PointingGameMetric",
        ann_file=data_root + "annotations/grounding_val2017_flickr30k.json",
    ),
]
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=4e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(sampling_offsets=dict(lr_mult=0.1))),
)
train_cfg = dict(max_iters=1500, val_interval=1500)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=1500, milestones=[1200], gamma=0.1),
]
default_hooks = dict(
    checkpoint=dict(interval=500), visualization=dict(type="GroundingVisualizationHook")
)
