# ResNet-10 with BatchFormer and the balanced softmax on ImageNet-LT: the authors'
# BalancedSoftmax/config/ImageNet_LT/balanced_softmax_resnet10.yaml with --add_bt 1. Their README
# has no number for it; the nearest are in resnet10-batchformer_1xb128_imagenet-lt.py.
_base_ = "./resnet10-batchformer_1xb128_imagenet-lt.py"
model = dict(head=dict(loss=dict(type="BalancedSoftmaxLoss")))
