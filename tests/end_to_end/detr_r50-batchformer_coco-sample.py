# DETR with BatchFormerV2, whose images are resized to one size and not cropped; see
# faster-rcnn_r50-triplet_fpn_coco-sample.py.
_base_ = "../../configs/mm/batchformer/detr_r50-batchformer_4xb8-50e_coco.py"
custom_hooks = [dict(type="ExactResumeHook")]
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="Resize", scale=(266, 160), keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ]
    ),
)
