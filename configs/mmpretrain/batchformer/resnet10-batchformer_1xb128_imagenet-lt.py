# ResNet-10 with BatchFormer and cross entropy on ImageNet-LT. The authors' README has no number for
# this setting. The nearest, top-1 of all | many | medium | few: RIDE with 3 experts 44.7 | 57.0 |
# 40.3 | 25.5, with BatchFormer 45.7 | 56.3 | 42.1 | 28.3. Their batch is 512 at a learning rate of
# 0.2, which is as much for each image.
_base_ = "./resnet50-batchformer_1xb128_imagenet-lt.py"
model = dict(backbone=dict(type="PluginResNet", depth=10), head=dict(in_channels=512))
