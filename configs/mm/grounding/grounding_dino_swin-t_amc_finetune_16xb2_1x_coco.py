_base_ = "mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py"
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="PluginGroundingDINO",
    attention_mask_consistency=dict(mean_margin=0.1, max_margin=0.5),
    encoder=dict(num_cp=0),  # gradients are differentiated, which checkpoints do not allow
)
