_base_ = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginDeformableDETR",
    neck=dict(bias=True),  # as in the original: the base leaves out these convolutions' biases
    batchformer=dict(insert_after=(0,)),
)

# The authors' batch: 8 GPUs with 3 images each, at the base's learning rate
train_dataloader = dict(batch_size=3)
auto_scale_lr = dict(base_batch_size=24)
