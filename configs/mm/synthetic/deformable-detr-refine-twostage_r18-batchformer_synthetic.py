# The same with BatchFormerV2 after the first encoder layer
_base_ = "deformable-detr-refine-twostage_r18_synthetic.py"
model = dict(type="PluginDeformableDETR", batchformer=dict(insert_after=(0,)))
