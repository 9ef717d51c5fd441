# ResNet-50 with BatchFormer and the balanced softmax on ImageNet-LT: the authors'
# BalancedSoftmax/config/ImageNet_LT/balanced_softmax_resnet50.yaml with --add_bt 1. Their README
# has no number for it; the nearest are in resnet50-batchformer_1xb128_imagenet-lt.py.
_base_ = "./resnet50-batchformer_1xb128_imagenet-lt.py"
model = dict(head=dict(loss=dict(type="BalancedSoftmaxLoss")))
