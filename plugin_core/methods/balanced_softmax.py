"""Balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740), section 3.

A softmax classifier trained on n_k images of class k learns their frequencies, too. The balanced
softmax has them in the training's probabilities instead, p_k ∝ n_k exp(logit_k), so that the logits
themselves fit balanced test data.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_logits(logits: Tensor, counts: Tensor) -> Tensor:
    """Add the logarithm of the classes' training images: what cross entropy is taken of.

    A class without an image gets a probability of practically 0, as the formula has it, and no
    gradient. Its logit stays finite, so that a soft label's 0 times it is 0.

    Args:
        logits: (…, K).
        counts: (K,), each at least 0.

    Returns:
        (…, K), of single precision or of the logits' where that is more.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)  # half precision ends at 65504
    counts = counts.to(logits.device, dtype)
    return logits.to(dtype) + counts.clamp(min=torch.finfo(dtype).tiny).log()
