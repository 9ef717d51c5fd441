# Evaluates where Grounding DINO looks, as well as its boxes, on the phrases of Flickr30k's val; a
# checkpoint that was trained with attention mask consistency is given to tools/test_mmdet.py.
_base_ = "mmdet::grounding_dino/flickr30k/grounding_dino_swin-t-pretrain_zeroshot_flickr30k.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginGroundingDINO", heatmap=dict(in_test=True))
val_dataloader = dict(dataset=dict(_delete_=True, **_base_.dataset_Flickr30k_val))
test_dataloader = val_dataloader
val_evaluator = [dict(type="Flickr30kMetric", prefix="recall"), dict(type="PointingGameMetric")]
test_evaluator = val_evaluator
