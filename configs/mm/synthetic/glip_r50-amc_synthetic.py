# The same with attention mask consistency
_base_ = "glip_r50_synthetic.py"
model = dict(attention_mask_consistency=dict(mean_margin=0.1, max_margin=0.5))
