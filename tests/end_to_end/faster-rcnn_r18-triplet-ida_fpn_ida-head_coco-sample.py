# The 1x config of a ResNet-18 with triplet attention, with IDA after it and as the classifier, and
# with exact resuming. It also takes what shrinks the training and points it to the photographs, see
# mmdet_sample.py.
_base_ = "../../configs/mm/triplet_attention/faster-rcnn_r18-triplet_fpn_1x_coco.py"
triplet = dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_conv2")
ida = dict(
    cfg=dict(type="IDABlock", warm_start=True),
    stages=(False, False, True, True),
    position="after_conv2",
)
model = dict(
    backbone=dict(plugins=[triplet, ida]),
    roi_head=dict(bbox_head=dict(type="IDABBoxHead")),
)
custom_hooks = [dict(type="ExactResumeHook")]
