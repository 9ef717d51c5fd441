_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(roi_head=dict(bbox_head=dict(type="IDABBoxHead")))
