# The same with attention mask consistency
_base_ = "grounding-dino_r50_synthetic.py"
model = dict(attention_mask_consistency=dict())
