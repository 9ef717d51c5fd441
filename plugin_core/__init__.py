"""The methods themselves: PyTorch only, one file a method, no framework import."""

from plugin_core.batchformer import BatchFormer
from plugin_core.ida import IDABlock, IDAClassifier
from plugin_core.triplet_attention import TripletAttention

__all__ = ["BatchFormer", "IDABlock", "IDAClassifier", "TripletAttention"]
