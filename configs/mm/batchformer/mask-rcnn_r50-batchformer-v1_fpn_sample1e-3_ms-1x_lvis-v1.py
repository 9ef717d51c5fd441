_base_ = "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(roi_head=dict(bbox_head=dict(type="BatchFormerBBoxHead")))
