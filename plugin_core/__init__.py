"""The methods themselves: PyTorch only, one file a method, no framework import."""

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

__all__ = [
    "AttentionMaskConsistency",
    "BatchFormer",
    "FunctionalEntropyRegularizer",
    "GradientHeatmap",
    "IDABlock",
    "IDAClassifier",
    "TripletAttention",
    "attention_mask_consistency_loss",
    "functional_entropy_penalty",
    "functional_information",
    "gradient_heatmap",
]
