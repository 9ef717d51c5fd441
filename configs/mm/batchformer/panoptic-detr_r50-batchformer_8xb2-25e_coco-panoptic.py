_base_ = "./panoptic-detr-boxes_r50-batchformer_8xb2-250e_coco-panoptic.py"
# The mask head alone, on the detector that the other config trains
model = dict(trains="masks", test_cfg=dict(instance_on=True))
load_from = "work_dirs/panoptic-detr-boxes_r50-batchformer_8xb2-250e_coco-panoptic/epoch_250.pth"

val_evaluator = [
    dict(
        type="PanopticQualityMetric",
        ann_file="data/coco/annotations/panoptic_val2017.json",
        seg_prefix="data/coco/annotations/panoptic_val2017/",
    ),
    dict(
        type="CocoMetric",
        ann_file="data/coco/annotations/instances_val2017.json",
        metric=["bbox", "segm"],
    ),
]
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=25)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=25, by_epoch=True, milestones=[15])]
