# The pointing game on Flickr30k Entities, each phrase alone as AMC's authors have it, of a
# checkpoint of blip-base-amc-itm_8xb32_refcoco+.py. Published for ALBEF: 86.59 (arXiv:2206.15462).
_base_ = "./blip-base-amc-itm_8xb32_refcoco+.py"
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type=None),
    dict(type="Resize", scale=(384, 384), interpolation="bicubic", backend="pillow"),
    dict(type="CleanCaption", keys="text"),
    dict(
        type="PackInputs",
        algorithm_keys=["text", "gt_bboxes", "gt_bboxes_labels", "scale_factor"],
        meta_keys=["img_id"],
    ),
]
dataset = dict(
    _delete_=True,
    type="mmdet.Flickr30kPhraseDataset",
    data_root="data/flickr30k_entities/",
    data_prefix=dict(img="flickr30k_images/"),
    pipeline=test_pipeline,
)
val_dataloader = dict(dataset=dict(dataset, ann_file="final_flickr_separateGT_val.json"))
test_dataloader = dict(dataset=dict(dataset, ann_file="final_flickr_separateGT_test.json"))
