"""The plugins in MMDetection. Importing this package registers them.

In a config: ``custom_imports = dict(imports=['mm_plugins'])``.
"""

import importlib.util

try:
    import mmdet  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mm_plugins needs MMDetection 3.3 with mmengine and mmcv 2.1 (built with its operators): "
        "`pip install -e .[mmdet]` in a checkout of this project"
    ) from error

# Only for registration
from mm_plugins import dense_heads, detectors, panoptic_quality, registry, resume  # noqa: F401
from mm_plugins.attention_mask_consistency import AMCMixin
from mm_plugins.backbones import PluginMobileNetV2, PluginResNet
from mm_plugins.batchformer import BatchFormerMixin, PixelDecoderBatchFormerMixin
from mm_plugins.block_plugins import BlockPlugin
from mm_plugins.grounding import datasets, pointing_game, transforms  # noqa: F401
from mm_plugins.grounding.functional_entropy import FunctionalEntropyMixin
from mm_plugins.panoptic_detr import PanopticDETR
from mm_plugins.roi_heads import BatchFormerBBoxHead, IDABBoxHead

_SPEC = importlib.util.find_spec("mmpretrain")
if _SPEC and _SPEC.origin:  # a folder of this name has none
    from mm_plugins import mmpretrain  # noqa: F401  # for registration in its registries

__all__ = [
    "AMCMixin",
    "BatchFormerBBoxHead",
    "BatchFormerMixin",
    "FunctionalEntropyMixin",
    "IDABBoxHead",
    "BlockPlugin",
    "PanopticDETR",
    "PixelDecoderBatchFormerMixin",
    "PluginMobileNetV2",
    "PluginResNet",
]
