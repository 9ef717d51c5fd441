# The same with both
_base_ = "grounding-dino_r50-amc_synthetic.py"
model = dict(functional_entropy=dict(samples=2, weight=1e-3))
