# The same with functional entropy regularization
_base_ = "grounding-dino_r50_synthetic.py"
model = dict(functional_entropy=dict(samples=2, weight=1e-3))
