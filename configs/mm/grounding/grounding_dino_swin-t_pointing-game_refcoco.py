# The pointing game on RefCOCO and RefCOCO+, of which every expression is a text
_base_ = "mmdet::grounding_dino/refcoco/grounding_dino_swin-t_pretrain_zeroshot_refexp.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(type="PluginGroundingDINO", heatmap=dict(in_test=True))
splits = [f"refcoco{kind}_{split}" for kind in ("", "+") for split in ("val", "testA", "testB")]
files = [f"mdetr_annotations/finetune_{split}.json" for split in splits]
datasets = [dict(_base_.val_dataset_all_val, ann_file=file) for file in files]
val_dataloader = dict(dataset=dict(datasets=datasets))
test_dataloader = val_dataloader
val_evaluator = dict(metrics=[dict(type="PointingGameMetric")] * 6, dataset_prefixes=splits)
test_evaluator = val_evaluator
