# The sample's config with gates of two norms, a trained checkpoint's norms in the rest of the
# network, and the weights of every process saved at the end.
_base_ = "faster-rcnn_r18-triplet-ida_fpn_ida-head_coco-sample.py"
custom_imports = dict(imports=["mm_plugins", "save_processes_hook"])
custom_hooks = [dict(type="SaveProcessesHook")]
of_each_process = dict(
    cfg=dict(type="TripletAttention", norm="BN"),
    stages=(True, True, False, False),
    position="after_conv2",
)
of_all_processes = dict(
    cfg=dict(type="TripletAttention", norm="SyncBN", postfix="2"),
    stages=(False, False, True, True),
    position="after_conv2",
)
model = dict(backbone=dict(norm_eval=True, plugins=[of_each_process, of_all_processes]))
