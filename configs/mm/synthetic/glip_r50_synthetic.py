# A small GLIP on the same scenes; its fusion needs a text model of 768 channels
# (tools/make_tiny_text_model.py --hidden-size 768 --heads 12). GLIP is trained with lists of names,
# so a caption's phrases are the text.
_base_ = "grounding-dino_r50_synthetic.py"

lang_model_name = "data/tiny-bert-768"

model = dict(
    _delete_=True,
    type="PluginGLIP",
    heatmap=dict(in_test=True),
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[103.53, 116.28, 123.675],
        std=[57.375, 57.12, 58.395],
        bgr_to_rgb=False,
        pad_size_divisor=32,
    ),
    backbone=_base_.model.backbone,
    neck=dict(
        type="FPN",
        in_channels=[128, 256, 512],
        out_channels=256,
        start_level=0,
        relu_before_extra_convs=True,
        add_extra_convs="on_output",
        num_outs=5,
    ),
    bbox_head=dict(
        type="ATSSVLFusionHead",
        lang_model_name=lang_model_name,
        early_fuse=True,
        num_dyhead_blocks=1,
        num_classes=4,
        in_channels=256,
        feat_channels=256,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=4,
            scales_per_octave=1,
            strides=[8, 16, 32, 64, 128],
            center_offset=0.5,
        ),
        bbox_coder=dict(
            type="DeltaXYWHBBoxCoderForGLIP",
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    ),
    language_model=dict(type="BertModel", name=lang_model_name),
    train_cfg=dict(
        assigner=dict(type="ATSSAssigner", topk=9, iou_calculator=dict(type="BboxOverlaps2D_GLIP")),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.6),
        max_per_img=20,
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=_base_.scale, keep_ratio=True),
    dict(type="PhrasesAsText"),
    dict(type="PackDetInputs", meta_keys=_base_.meta_keys),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
