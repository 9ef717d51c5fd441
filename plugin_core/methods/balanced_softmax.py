"""Balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740), section 3.

A softmax classifier trained on n_k images of class k learns their frequencies, too. The balanced
softmax has them in the training's probabilities instead, p_k ∝ n_k exp(logit_k), so that the logits
themselves fit balanced test data.
"""

from __future__ import annotations

from torch import Tensor


def balanced_logits(logits: Tensor, counts: Tensor) -> Tensor:
    """Add the logarithm of the classes' training images: what cross entropy is taken of.

    Args:
        logits: (…, K).
        counts: (K,), each at least 1.

    Returns:
        (…, K).
    """
    return logits + counts.to(logits).log()
