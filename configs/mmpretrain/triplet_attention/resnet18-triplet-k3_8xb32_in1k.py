# Published: top-1 error 29.67, top-5 error 10.42 (the authors' repository)
_base_ = "resnet18-triplet_8xb32_in1k.py"
layer = dict(type="TripletAttention", kernel_size=3)
model = dict(backbone=dict(plugins=[dict(cfg=layer, position="after_conv2")]))
