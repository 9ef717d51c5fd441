_base_ = "../triplet_attention/faster-rcnn_r50-triplet_fpn_1x_coco.py"
layer = dict(type="BlockPlugin", name="timm:gc", warm_start=True)
model = dict(backbone=dict(plugins=[dict(cfg=layer, position="after_conv3")]))
