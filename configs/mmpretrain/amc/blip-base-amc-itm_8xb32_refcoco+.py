# AMC as its authors have it: the score is the logit that image and phrase match. On RefCOCO+.
# Published for ALBEF finetuned on Visual Genome: 86.59 in Flickr30k's pointing game
# (arXiv:2206.15462). For BLIP nothing is published.
_base_ = "mmpretrain::blip/blip-base_8xb32_retrieval.py"
custom_imports = dict(imports=["mm_plugins"])
load_from = "https://download.openmmlab.com/mmclassification/v1/blip/blip-base_3rdparty_coco-retrieval_20230419-a1804d2c.pth"
model = dict(type="AMCBlipRetrieval", attention_mask_consistency=dict())
pack = dict(
    type="PackInputs",
    algorithm_keys=["text", "gt_bboxes", "scale_factor"],
    meta_keys=["image_id"],
)
resize = dict(type="Resize", scale=(384, 384), interpolation="bicubic", backend="pillow")
# No flips and no hues: expressions say "left" and "red".
jitter = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomApply", transforms=[dict(jitter, backend="cv2")], prob=0.5),
    resize,
    dict(type="CleanCaption", keys="text"),
    pack,
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="CleanCaption", keys="text"),
    pack,
]
dataset = dict(
    _delete_=True,
    type="RefCOCO",
    data_root="data/coco",
    data_prefix="train2014",
    ann_file="refcoco+/instances.json",
    split_file="refcoco+/refs(unc).p",
)
train_dataloader = dict(dataset=dict(dataset, split="train", pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16,
    dataset=dict(dataset, split="val", pipeline=test_pipeline),
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=False),
)
test_dataloader = dict(
    batch_size=16,
    dataset=dict(dataset, split="testA", pipeline=test_pipeline),  # or testB
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=False),
)
val_evaluator = dict(_delete_=True, type="HeatmapPointingGame")
test_evaluator = val_evaluator
val_cfg = dict(_delete_=True)
test_cfg = dict(_delete_=True)
# Rate and decay are the authors', who train for 30 epochs at 256 pixels by a cosine to 1e-6.
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=0.02))
