from detectron2.config import LazyConfig

# The same without masks
model, dataloader, train, optimizer, lr_multiplier = LazyConfig.load_rel(
    "../COCO-InstanceSegmentation/mask_rcnn_R_50_triplet_FPN_1x.py",
    ("model", "dataloader", "train", "optimizer", "lr_multiplier"),
)
for _part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_part)
dataloader.train.mapper.use_instance_mask = False
