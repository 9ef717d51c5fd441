_base_ = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
# A list is replaced as a whole: the heads of the base's three stages, of another type.
heads = [dict(head, type="BatchFormerBBoxHead") for head in _base_.model.roi_head.bbox_head]
model = dict(roi_head=dict(bbox_head=heads))
