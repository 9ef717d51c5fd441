"""The plugins in MMPretrain, for classifiers whose backbones are then the detectors'.

``import mm_plugins`` imports this package where MMPretrain is installed, ``mmpretrain`` or
``onedl-mmpretrain``. A config names the parts as MMDetection's configs do::

    custom_imports = dict(imports=["mm_plugins"])
    triplet = dict(cfg=dict(type="TripletAttention"), position="after_conv3")
    model = dict(backbone=dict(type="PluginResNet", plugins=[triplet]))
"""

from mmpretrain.utils.dependency import WITH_MULTIMODAL

from mm_plugins.mmpretrain import (  # noqa: F401  # for registration
    asymmetric_loss,
    backbones,
    balanced_softmax_loss,
    batchformer_heads,
    cifar,
    class_counts,
    coco_multi_label,
    contrastive,
    ida_heads,
    linear_heads,
    long_tail,
    multi_label_metrics,
    pointing_game,
    resnet_cifar,
    vision_transformers,
)

if WITH_MULTIMODAL:  # transformers is there
    from mm_plugins.mmpretrain import amc_grounding, updn_vqa, vqa_cp  # noqa: F401
