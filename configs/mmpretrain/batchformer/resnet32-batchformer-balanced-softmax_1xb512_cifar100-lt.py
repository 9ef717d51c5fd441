# ResNet-32 with BatchFormer and the balanced softmax on CIFAR-100-LT, imbalance factor 100: the
# authors' BalancedSoftmax/config/CIFAR100_LT/balanced_softmax_imba100.yaml with --add_bt 1. Their
# README has no number on CIFAR.
_base_ = "./resnet32-batchformer_1xb512_cifar100-lt.py"
model = dict(head=dict(loss=dict(type="BalancedSoftmaxLoss")))
