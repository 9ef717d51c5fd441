# The public reproduction reads VOC 2007, but has no command and no number for it: this is its
# training on COCO. Classes of which an image has difficult objects alone count as absent, as there.
# VOC's own evaluation is dict(type="VOCMultiLabelBenchmark") with "gt_label_difficult" among the
# meta_keys of PackInputs.
_base_ = "./resnet101-ida-heavy_4xb32_coco2014-448px.py"
num_classes = 20
model = dict(head=dict(num_classes=num_classes, loss=dict(loss_weight=32 / num_classes)))
data_preprocessor = dict(num_classes=num_classes)
voc = dict(_delete_=True, type="VOC", data_root="data/VOC2007")
train_dataloader = dict(dataset=dict(split="trainval", pipeline=_base_.train_pipeline, **voc))
val_dataloader = dict(
    dataset=dict(split="test", pipeline=_base_.test_pipeline, test_mode=True, **voc)
)
test_dataloader = val_dataloader
