_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginDETR",
    backbone=dict(
        type="PluginResNet",
        strides=(1, 2, 2, 1),  # DC5: the last stage is dilated, but for its first block
        dilations=(1, 1, 1, 2),
        contract_dilation=True,
    ),
    batchformer=dict(insert_after=(0,)),
)

# The schedule and batch of BatchFormerV2's DETR
train_dataloader = dict(batch_size=8)
train_cfg = dict(max_epochs=50)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=50, by_epoch=True, milestones=[40])]
auto_scale_lr = dict(base_batch_size=32)
