_base_ = "../triplet_attention/retinanet_r50-triplet_fpn_1x_coco.py"
layer = dict(type="BlockPlugin", name="timm:cbam", warm_start=True)
model = dict(backbone=dict(plugins=[dict(cfg=layer, position="after_conv3")]))
