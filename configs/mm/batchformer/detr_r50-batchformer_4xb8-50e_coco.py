_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginDETR", batchformer=dict(insert_after=(0,)))

# The authors' epochs and batch, the 50-epoch DETR's fall; the rate is the base's, DETR's own.
train_dataloader = dict(batch_size=8)
train_cfg = dict(max_epochs=50)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=50, by_epoch=True, milestones=[40])]
auto_scale_lr = dict(base_batch_size=32)
