# The sample's config, with the weights of every process saved at the end.
_base_ = "faster-rcnn_r50-triplet_fpn_coco-sample.py"
custom_imports = dict(imports=["mm_plugins", "save_processes_hook"])
custom_hooks = [dict(type="SaveProcessesHook")]
