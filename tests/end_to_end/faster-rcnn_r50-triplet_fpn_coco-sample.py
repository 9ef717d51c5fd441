# The 1x config with what the command line cannot set. It also takes what shrinks the training and
# points it to the sample, see mmdet_sample.py.
_base_ = "../../configs/mm/triplet_attention/faster-rcnn_r50-triplet_fpn_1x_coco.py"
custom_hooks = [dict(type="ExactResumeHook")]
