# ResNet-50 with BatchFormer and the balanced softmax on iNaturalist 2018: the authors'
# BalancedSoftmax/config/iNaturalist18/balanced_softmax.yaml with --add_bt 1. Their README has no
# number for it; the nearest are in resnet50-batchformer_1xb128_inat18.py.
_base_ = "./resnet50-batchformer_1xb128_inat18.py"
model = dict(head=dict(loss=dict(type="BalancedSoftmaxLoss")))
