# The 1x config with IDA in stages and head; see faster-rcnn_r50-triplet_fpn_coco-sample.py.
_base_ = "../../configs/mm/ida/faster-rcnn_r50-ida_fpn_ida-head_1x_coco.py"
custom_hooks = [dict(type="ExactResumeHook")]
