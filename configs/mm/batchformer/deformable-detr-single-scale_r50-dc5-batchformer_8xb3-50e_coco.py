_base_ = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginDeformableDETR",
    num_feature_levels=1,
    backbone=dict(
        out_indices=(3,),
        type="PluginResNet",
        strides=(1, 2, 2, 1),  # DC5: the last stage is dilated, but for its first block
        dilations=(1, 1, 1, 2),
        contract_dilation=True,
    ),
    neck=dict(in_channels=[2048], num_outs=1, bias=True),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=1))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=1))),
    batchformer=dict(insert_after=(0,)),
)

# The authors' batch: 8 GPUs with 3 images each, at the base's learning rate
train_dataloader = dict(batch_size=3)
auto_scale_lr = dict(base_batch_size=24)
