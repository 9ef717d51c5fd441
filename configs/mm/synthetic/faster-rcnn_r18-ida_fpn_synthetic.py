# The studies' detector with IDA in stages 4 and 5 in place of triplet attention
_base_ = "faster-rcnn_r18-triplet_fpn_synthetic.py"
plugin = dict(
    cfg=dict(type="IDABlock", warm_start=True),
    stages=(False, False, True, True),
    position="after_conv2",
)
model = dict(backbone=dict(plugins=[plugin]))
