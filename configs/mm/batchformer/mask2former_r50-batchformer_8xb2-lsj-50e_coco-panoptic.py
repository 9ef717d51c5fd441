_base_ = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py"
custom_imports = dict(imports=["mm_plugins"])
# In the encoder of the pixel decoder
model = dict(type="PluginMask2Former", batchformer=dict(insert_after=(0,)))
