from detectron2.model_zoo import get_config

from d2_plugins.backbones import build_resnet_with_plugins

_base = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model, dataloader, train = _base.model, _base.dataloader, _base.train
optimizer, lr_multiplier = _base.optimizer, _base.lr_multiplier

_bottom_up = model.backbone.bottom_up
_bottom_up._target_ = build_resnet_with_plugins
_stages = ["res2", "res3", "res4", "res5"]
_bottom_up.plugins = [dict(name="triplet_attention", stages=_stages, warm_start=True)]
_bottom_up.freeze_at = 1  # res2 trains: the weights hold no attention

# What torchvision's weights and the published detectors want: RGB, divided by the standard
# deviation, stride in the 3x3 convolution
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
_bottom_up.stages.stride_in_1x1 = False
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean = [123.675, 116.280, 103.530]
model.pixel_std = [58.395, 57.120, 57.375]

dataloader.evaluator.output_dir = "${train.output_dir}/inference"
