# Evaluates where Grounding DINO looks, as well as its boxes, on the phrases of Flickr30k: on val in
# a training, on test by tools/test_mmdet.py, of a checkpoint such as one trained with AMC.
_base_ = "mmdet::grounding_dino/flickr30k/grounding_dino_swin-t-pretrain_zeroshot_flickr30k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginGroundingDINO", heatmap=dict(in_test=True))
val_dataloader = dict(dataset=dict(_delete_=True, **_base_.dataset_Flickr30k_val))
test_dataloader = dict(dataset=dict(_delete_=True, **_base_.dataset_Flickr30k_test))
val_evaluator = [dict(type="Flickr30kMetric", prefix="recall"), dict(type="PointingGameMetric")]
test_evaluator = val_evaluator
