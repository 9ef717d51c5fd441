_base_ = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py"
custom_imports = dict(imports=["mm_plugins"])
# In the encoder of the pixel decoder
model = dict(type="PluginMask2Former", batchformer=dict(insert_after=(0,)))

# Without panopticapi
train_pipeline = _base_.train_pipeline
train_pipeline[1]["type"] = "LoadPanopticSegments"
test_pipeline = _base_.test_pipeline
test_pipeline[2]["type"] = "LoadPanopticSegments"
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = _base_.val_evaluator
val_evaluator[0]["type"] = "PanopticQualityMetric"
test_evaluator = val_evaluator
