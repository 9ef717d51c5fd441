_base_ = "mmdet::glip/glip_atss_swin-t_c_fpn_dyhead_16xb2_ms-2x_funtune_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginGLIP",
    attention_mask_consistency=dict(mean_margin=0.1, max_margin=0.5),
    functional_entropy=dict(samples=2, weight=1e-10),
    # gradients are differentiated, which checkpoints do not allow
    bbox_head=dict(use_checkpoint=False),
)
