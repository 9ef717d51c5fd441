# The classifier of drawn images with BatchFormer.
_base_ = "./resnet10_long-tail_synthetic.py"
model = dict(head=dict(type="BatchFormerClsHead"))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"head.batchformer": dict(lr_mult=0.1)}))
