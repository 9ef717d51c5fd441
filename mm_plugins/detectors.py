"""MMDetection's detectors with BatchFormerV2, attention mask consistency and functional entropy.

Name one in place of MMDetection's own; without settings it is the plain detector::

    model = dict(type='PluginGroundingDINO', batchformer=dict(insert_after=(0,)),
                 attention_mask_consistency=dict(), functional_entropy=dict())

A detector of one's own takes the mixins that it needs: ``class MyDETR2(BatchFormerMixin, MyDETR)``.
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


@MODELS.register_module()
class PluginDETR(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, DETR):
    """DETR with any of the methods."""


@MODELS.register_module()
class PluginConditionalDETR(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, ConditionalDETR):
    """ConditionalDETR with any of the methods."""


@MODELS.register_module()
class PluginDABDETR(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, DABDETR):
    """DABDETR with any of the methods."""


@MODELS.register_module()
class PluginDeformableDETR(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, DeformableDETR):
    """DeformableDETR with any of the methods."""


@MODELS.register_module()
class PluginDINO(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, DINO):
    """DINO with any of the methods."""


@MODELS.register_module()
class PluginDDQDETR(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, DDQDETR):
    """DDQDETR with any of the methods."""


@MODELS.register_module()
class PluginGroundingDINO(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, GroundingDINO):
    """GroundingDINO with any of the methods."""


@MODELS.register_module()
class PluginGLIP(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, GLIP):
    """GLIP with any of the methods."""


@MODELS.register_module()
class PluginFasterRCNN(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, FasterRCNN):
    """FasterRCNN with any of the methods."""


@MODELS.register_module()
class PluginMaskRCNN(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, MaskRCNN):
    """MaskRCNN with any of the methods."""


@MODELS.register_module()
class PluginCascadeRCNN(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, CascadeRCNN):
    """CascadeRCNN with any of the methods."""


@MODELS.register_module()
class PluginRetinaNet(FunctionalEntropyMixin, AMCMixin, BatchFormerMixin, RetinaNet):
    """RetinaNet with any of the methods."""


@MODELS.register_module()
class PluginMaskFormer(FunctionalEntropyMixin, AMCMixin, PixelDecoderBatchFormerMixin, MaskFormer):
    """MaskFormer with any of the methods."""


@MODELS.register_module()
class PluginMask2Former(
    FunctionalEntropyMixin, AMCMixin, PixelDecoderBatchFormerMixin, Mask2Former
):
    """Mask2Former with any of the methods."""
