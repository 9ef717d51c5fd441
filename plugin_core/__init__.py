"""Published methods for detectors, each written once; PyTorch only, no framework import."""

from plugin_core.block_plugins import (
    BlockPlugin,
    build_block_plugin,
    register_block_plugin,
    registered_block_plugins,
)
from plugin_core.errors import ArgumentError
from plugin_core.kernels import set_kernels
from plugin_core.methods.attention_mask_consistency import (
    AttentionMaskConsistency,
    GradientHeatmap,
    attention_mask_consistency_loss,
    gradient_heatmap,
)
from plugin_core.methods.batchformer import BatchFormer
from plugin_core.methods.functional_entropy import (
    FunctionalEntropyRegularizer,
    functional_entropy_penalty,
    functional_information,
)
from plugin_core.methods.ida import IDABlock, IDAClassifier
from plugin_core.methods.triplet_attention import TripletAttention
from plugin_core.timm_layers import timm_layer

__version__ = "0.2.0"

__all__ = [
    "ArgumentError",
    "AttentionMaskConsistency",
    "BatchFormer",
    "BlockPlugin",
    "FunctionalEntropyRegularizer",
    "GradientHeatmap",
    "IDABlock",
    "IDAClassifier",
    "TripletAttention",
    "attention_mask_consistency_loss",
    "build_block_plugin",
    "functional_entropy_penalty",
    "functional_information",
    "gradient_heatmap",
    "register_block_plugin",
    "registered_block_plugins",
    "set_kernels",
    "timm_layer",
]
