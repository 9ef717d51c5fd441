"""MMDetection's detectors with BatchFormerV2, attention mask consistency and functional entropy.

Name one in place of MMDetection's own; without settings it is the plain detector. Each takes the
methods that its docstring names, and refuses the settings of others::

    model = dict(type='PluginGroundingDINO', batchformer=dict(insert_after=(0,)),
                 attention_mask_consistency=dict(), functional_entropy=dict())

A detector of one's own takes the mixins that it needs: ``class MyDETR2(BatchFormerMixin, MyDETR)``.
They are in the order ``FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, MyDetector``.
"""

from __future__ import annotations

from mmdet.models.detectors import (
    DABDETR,
    DDQDETR,
    DETR,
    DINO,
    GLIP,
    CascadeRCNN,
    ConditionalDETR,
    DeformableDETR,
    FasterRCNN,
    GroundingDINO,
    Mask2Former,
    MaskFormer,
    MaskRCNN,
    RetinaNet,
)
from mmdet.registry import MODELS

from mm_plugins.attention_mask_consistency import AMCMixin
from mm_plugins.batchformer import BatchFormerMixin, PixelDecoderBatchFormerMixin
from mm_plugins.grounding.functional_entropy import FunctionalEntropyMixin
from mm_plugins.panoptic_detr import PanopticDETR


@MODELS.register_module()
class PluginDETR(AMCMixin, BatchFormerMixin, DETR):
    """DETR with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginPanopticDETR(AMCMixin, BatchFormerMixin, PanopticDETR):
    """DETR with its mask head, with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginConditionalDETR(AMCMixin, BatchFormerMixin, ConditionalDETR):
    """ConditionalDETR with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginDABDETR(AMCMixin, BatchFormerMixin, DABDETR):
    """DABDETR with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginDeformableDETR(AMCMixin, BatchFormerMixin, DeformableDETR):
    """DeformableDETR with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginDINO(AMCMixin, BatchFormerMixin, DINO):
    """DINO with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginDDQDETR(AMCMixin, BatchFormerMixin, DDQDETR):
    """DDQDETR with attention mask consistency and BatchFormerV2."""


@MODELS.register_module()
class PluginGroundingDINO(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, GroundingDINO):
    """GroundingDINO with all three methods."""


@MODELS.register_module()
class PluginGLIP(FunctionalEntropyMixin, AMCMixin, GLIP):
    """GLIP with attention mask consistency and functional entropy."""


@MODELS.register_module()
class PluginFasterRCNN(AMCMixin, FasterRCNN):
    """FasterRCNN with attention mask consistency."""


@MODELS.register_module()
class PluginMaskRCNN(AMCMixin, MaskRCNN):
    """MaskRCNN with attention mask consistency."""


@MODELS.register_module()
class PluginCascadeRCNN(AMCMixin, CascadeRCNN):
    """CascadeRCNN with attention mask consistency."""


@MODELS.register_module()
class PluginRetinaNet(AMCMixin, RetinaNet):
    """RetinaNet with attention mask consistency."""


@MODELS.register_module()
class PluginMaskFormer(PixelDecoderBatchFormerMixin, MaskFormer):
    """MaskFormer with BatchFormerV2."""


@MODELS.register_module()
class PluginMask2Former(PixelDecoderBatchFormerMixin, Mask2Former):
    """Mask2Former with BatchFormerV2."""
