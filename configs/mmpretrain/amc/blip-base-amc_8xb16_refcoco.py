# BLIP's grounding model with AMC; the score is the log-likelihood of the box. Nothing is published
# for it. MMPretrain's checkpoint, without AMC, has 86.14 (testA) and 77.33 (testB) at IoU 0.5.
_base_ = "mmpretrain::blip/blip-base_8xb16_refcoco.py"
custom_imports = dict(imports=["mm_plugins"])
load_from = "https://download.openmmlab.com/mmclassification/v1/blip/blip-base_8xb16_refcoco_20230508-d2d10f4c.pth"
model = dict(type="AMCBlipGrounding", attention_mask_consistency=dict())
# In place of the base's, whose translation fails for images of 384 pixels. No flips and no hues:
# expressions say "left" and "red".
jitter = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomApply", transforms=[dict(jitter, backend="cv2")], prob=0.5),
    *_base_.test_pipeline[1:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = [dict(type="VisualGroundingMetric"), dict(type="HeatmapPointingGame")]
test_evaluator = val_evaluator
