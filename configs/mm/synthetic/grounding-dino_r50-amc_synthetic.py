# The same with attention mask consistency, with the weight that the boxes' losses have together
_base_ = "grounding-dino_r50_synthetic.py"
model = dict(
    attention_mask_consistency=dict(
        mean_weight=10.0, max_weight=10.0, mean_margin=0.1, max_margin=0.5
    )
)
