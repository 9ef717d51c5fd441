# Published: top-1 error 23.88, top-5 error 6.938 (the authors' repository)
_base_ = "resnet50-triplet_8xb32_in1k.py"
layer = dict(type="TripletAttention", kernel_size=3)
model = dict(backbone=dict(plugins=[dict(cfg=layer, position="after_conv3")]))
