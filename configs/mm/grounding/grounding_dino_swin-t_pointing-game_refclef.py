# The same on RefCLEF, in the files of REFER
_base_ = "grounding_dino_swin-t_pointing-game_refcoco.py"
root = dict(data_root="data/refclef/", data_prefix=dict(img_path="saiapr_tc-12/"), test_mode=True)
refs = dict(ann_file="instances.json", split_file="refs(berkeley).p", pipeline=_base_.test_pipeline)
datasets = [dict(type="ReferDataset", split=split, **root, **refs) for split in ("val", "test")]
splits = ["refclef_val", "refclef_test"]
val_dataloader = dict(dataset=dict(datasets=datasets))
test_dataloader = val_dataloader
val_evaluator = dict(metrics=[dict(type="PointingGameMetric")] * 2, dataset_prefixes=splits)
test_evaluator = val_evaluator
