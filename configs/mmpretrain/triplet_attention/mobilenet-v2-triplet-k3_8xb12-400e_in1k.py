# Published: top-1 error 27.38, top-5 error 9.23 (the authors' repository)
_base_ = "mobilenet-v2-triplet_8xb12-400e_in1k.py"
layer = dict(type="TripletAttention", init="kaiming", kernel_size=3)
model = dict(backbone=dict(plugins=[dict(cfg=layer, position="after_linear_conv")]))
