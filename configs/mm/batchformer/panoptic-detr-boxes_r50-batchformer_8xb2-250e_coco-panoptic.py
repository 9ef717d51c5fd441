_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginPanopticDETR",
    # The authors' panoptic script names no layer, which means all of them, and one BatchFormer.
    batchformer=dict(insert_after=(0, 1, 2, 3, 4, 5), share=True),
    trains="boxes",
    data_preprocessor=dict(pad_mask=True, mask_pad_value=0, pad_seg=True, seg_pad_value=255),
    backbone=dict(out_indices=(0, 1, 2, 3)),
    bbox_head=dict(num_classes=133),
    panoptic_head=dict(type="DETRPanopticHead", num_things_classes=80, num_stuff_classes=53),
)

train_pipeline = _base_.train_pipeline
train_pipeline[1] = dict(type="LoadPanopticSegments")
test_pipeline = [step for step in _base_.test_pipeline if step["type"] != "LoadAnnotations"]
train_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_train2017.json",
        data_prefix=dict(seg="annotations/panoptic_train2017/"),
        # An image of stuff alone is not empty.
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_val2017.json",
        data_prefix=dict(seg="annotations/panoptic_val2017/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

# The authors take the weights of epoch 250 of 300.
train_cfg = dict(max_epochs=250)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=250, by_epoch=True, milestones=[200])]
