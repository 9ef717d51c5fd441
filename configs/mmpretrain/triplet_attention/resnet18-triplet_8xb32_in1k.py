# Published: top-1 error 28.91, top-5 error 10.01 (the authors' repository)
_base_ = "mmpretrain::resnet/resnet18_8xb32_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
# The base's schedule is the authors': SGD, 0.1, divided by 10 every 30 of 100 epochs, batch 256.
model = dict(
    backbone=dict(
        type="PluginResNet",  # MMDetection's, so that the checkpoint is a detector's backbone
        zero_init_residual=False,  # as the authors
        plugins=[dict(cfg=dict(type="TripletAttention"), position="after_conv2")],
    )
)
