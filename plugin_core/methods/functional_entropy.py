"""Functional entropy regularization (Gat et al., NeurIPS 2020, arXiv 2010.10802).

A classifier of several modalities x_1 … x_M may rest on the one that is easiest to learn from and
ignore the others. A functional Fisher information bounds how much it draws from x_m. It is measured
on n noisy copies of each of the B samples (R = B·n rows)::

    x̃_m  = x_m + N(0, std of x_m over the batch)          every modality with noise of its own
    loss = loss(model(x̃_1 … x̃_M), softmax(clean logits))  the targets are the clean samples'
    I_m  = mean over rows of |∂loss/∂x̃_m|² / loss         bound of the entropy (log-Sobolev)
    I_m  = mean over rows of |∂loss/∂x̃_m|²                bound of the variance (Poincaré)
    term = weight · |(1/I_1 … 1/I_M)|_p                   added to the training loss

The term is large if any modality informs little. The loss is a mean over all rows, so I_m falls
with R². A useful weight depends on the batch size.

The authors' code (https://github.com/itaigat/removing-bias-in-multi-modal-classifiers) reads three
of these lines differently; ``as_published`` follows it:

- the std of x_m is taken over all R rows, n times each sample, and gradients pass through it;
- gradients pass through the targets, too;
- for x_m of more than two dimensions, ``|∂loss/∂x̃_m|²`` is the sum over the second dimension
  alone, and the mean is over rows and all other dimensions. So I_m is smaller by their number of
  elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.errors import ArgumentError, check_bool, check_one_of, check_positive_int
from plugin_core.kernels.precision import in_float32

# One tensor, or several such as the levels of a feature pyramid
Features: TypeAlias = Tensor | Sequence[Tensor]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

BOUNDS = ("entropy", "variance")
METHODS = ("max_ent", "min_ent", "max_ent_minus")
TARGETS = ("softmax", "sigmoid")
# The least divisor. A smaller one is replaced by it and gets no gradient.
FLOOR = 1e-12


class FunctionalEntropyRegularizer(nn.Module):
    """Punish a model that draws little from one of its modalities.

    It computes in float32, or float64 for such features, outside of autocast.

    Its gradient differentiates the model twice. PyTorch's attention does so by its mathematical
    path, which is chosen here. No other layer between features and logits may lack a second
    derivative, as torchvision's RoIAlign and deformable attention in CUDA do.

    Args:
        samples: noisy copies of each sample, n ≥ 1.
        bound: "entropy" or "variance", see :func:`functional_information`.
        norm: p ≥ 1, see :func:`functional_entropy_penalty`.
        method: "max_ent", "min_ent" or "max_ent_minus", see :func:`functional_entropy_penalty`.
        weight: λ of the term, finite and ≥ 0; 1e-10 on VQA-CP in the paper.
        loss: maps logits and targets of equal shape to a scalar ≥ 0; None for the mean binary cross
            entropy with logits, the authors' choice for answers.
        target: "softmax" over the last dimension of the clean logits, or "sigmoid" where each logit
            is a decision of its own.
        as_published: compute as the authors' code does, see the top of this module.

    Raises:
        ArgumentError: if an argument is out of its range.
    """

    def __init__(
        self,
        samples: int = 3,
        bound: str = "entropy",
        norm: float = 2.0,
        method: str = "max_ent",
        weight: float = 1e-10,
        loss: Loss | None = None,
        target: str = "softmax",
        as_published: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int(samples=samples)
        check_one_of("bound", bound, BOUNDS)
        _check_norm(norm)
        check_one_of("method", method, METHODS)
        check_one_of("target", target, TARGETS)
        if not 0 <= weight < float("inf"):
            raise ArgumentError("weight", f"must be a finite number ≥ 0, got {weight!r}")
        if loss is not None and not callable(loss):
            raise ArgumentError("loss", f"must be a function of logits and targets, got {loss!r}")
        check_bool(as_published=as_published)
        self.samples = samples
        self.bound = bound
        self.norm = norm
        self.method = method
        self.weight = weight
        self.loss: Loss = F.binary_cross_entropy_with_logits if loss is None else loss
        self.target = target
        self.as_published = as_published

    def forward(
        self,
        model: Callable[[dict[str, Features]], Tensor],
        modalities: Mapping[str, Features],
        logits: Tensor,
        masks: Mapping[str, Features] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure the information of each modality and make the term.

        Gradients of the term reach ``model`` and the features, and ``logits`` if ``as_published``.
        Under ``torch.no_grad`` the information is measured all the same.

        Args:
            model: maps perturbed features to logits (B·n, …). It gets the names of ``modalities``
                with B·n rows each, a tuple for a sequence. The rows of a sample follow one another:
                repeat other inputs of the model, such as padding masks, by :func:`repeat_samples`.
                Layers that keep statistics count these rows.
            modalities: features (B, …), or sequences of them, by names of your choice.
            logits: (B, …), of the clean features.
            masks: bool (B, T), False for padding, by the names of modalities (B, T, C) that have
                any; a sequence of masks for a sequence. See :func:`perturb`.
            valid: bool, True for logits that count; None for all. It has the shape of ``logits`` or
                of its leading dimensions, or 1 to be broadcast. With logits (B, T, K), ``loss``
                gets (number of valid, K) for (B, T), and (number of valid,) for (B, T, K).

        Returns:
            The weighted term, a scalar, and the information of each modality by its name, scalars
            without gradient. All are 0 if there are no samples or no valid logits.

        Raises:
            ValueError: if features, masks or logits do not fit each other.
        """
        names, given = list(modalities), list(modalities.values())
        if not names:
            raise ValueError("modalities must name at least one, got none")
        masks = {} if masks is None else masks
        if unknown := sorted(set(masks) - set(names)):
            raise ValueError(f"masks: unknown modality {unknown[0]!r}; modalities has {names}")
        for name, features in modalities.items():
            _check_features(name, features, masks.get(name), len(logits))
        selected = None if valid is None else self._selected(valid, logits)
        if not logits.numel() or (selected is not None and not selected.any()):
            sums = [x.sum() for features in given for x in _as_tuple(features)]
            nothing = 0 * in_float32(torch.stack(sums).sum())
            return nothing, {name: nothing.detach() for name in names}

        differentiable = torch.is_grad_enabled()
        with (
            torch.enable_grad(),
            torch.autocast(logits.device.type, enabled=False),
            _attention_differentiable_twice(),
        ):
            perturbed = {
                name: self._perturb(features, masks.get(name))
                for name, features in modalities.items()
            }
            target = expand_target(
                in_float32(logits), self.samples, self.target, detach=not self.as_published
            )
            outputs = model(dict(perturbed))
            if not isinstance(outputs, Tensor) or outputs.shape != target.shape:
                shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs)
                raise ValueError(
                    f"model must give the logits of {self.samples} copies of each sample, "
                    f"{tuple(target.shape)}, got {shape}"
                )
            outputs = in_float32(outputs)
            if selected is not None:
                outputs, target = outputs[selected], target[selected]
            loss = self.loss(outputs, target)
            if loss.dim() or not loss.requires_grad:
                raise ValueError(
                    "loss must give a scalar that depends on the modalities' features, got shape "
                    f"{tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                )
            scores = self._information(perturbed, loss, differentiable)
            term = self.weight * functional_entropy_penalty(scores, self.norm, self.method)
        information = dict(zip(names, scores.detach(), strict=True))
        return (term if differentiable else term.detach()), information

    def _perturb(self, features: Features, mask: Features | None) -> Features:
        """Make noisy copies that require gradients, in the graph of the features."""
        tensors = _as_tuple(features)
        masks = (None,) * len(tensors) if mask is None else _as_tuple(mask)
        perturbed = [
            perturb(in_float32(x), self.samples, m, self.as_published)
            for x, m in zip(tensors, masks, strict=True)
        ]
        for x in perturbed:
            if not x.requires_grad:
                x.requires_grad_()
        return perturbed[0] if isinstance(features, Tensor) else tuple(perturbed)

    def _information(
        self, perturbed: Mapping[str, Features], loss: Tensor, create_graph: bool
    ) -> Tensor:
        """I_m of each modality, (M,), by one backward pass for all."""
        tensors = [_as_tuple(features) for features in perturbed.values()]
        gradients = list(
            torch.autograd.grad(
                loss,
                [x for levels in tensors for x in levels],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,  # an unused modality informs of nothing
            )
        )
        scores = []
        for levels in tensors:
            of_levels = [gradients.pop(0) for _ in levels]
            score = functional_information(of_levels, loss, self.bound, self.as_published)
            scores.append(score)
        return torch.stack(scores)

    def _selected(self, valid: Tensor, logits: Tensor) -> Tensor:
        """Where the logits (B·n, …) count."""
        _check_mask("valid", valid)
        shape = logits.shape[: valid.dim()]
        if valid.dim() > logits.dim() or not _can_expand(valid, shape):
            raise ValueError(
                f"valid must have the shape of the logits {tuple(logits.shape)} or of its leading "
                f"dimensions, got {tuple(valid.shape)}"
            )
        return repeat_samples(valid.expand(shape), self.samples)

    def extra_repr(self) -> str:
        return (
            f"samples={self.samples}, bound={self.bound!r}, norm={self.norm:g}, "
            f"method={self.method!r}, weight={self.weight:g}, target={self.target!r}, "
            f"as_published={self.as_published}"
        )


# ---------------------------------------------------------------------- from gradients to the term


def functional_information(
    gradient: Features, loss: Tensor, bound: str = "entropy", as_published: bool = False
) -> Tensor:
    """Measure how much a model draws from a modality: I_m.

    Args:
        gradient: ∂loss/∂x̃_m (R, …), or several with R rows each, whose squares add up.
        loss: scalar ≥ 0, counted as at least 1e-12.
        bound: "entropy" divides by the loss (log-Sobolev inequality); "variance" does not (Poincaré
            inequality).
        as_published: of gradients (R, C, …) take the mean over what follows C, not the sum.

    Returns:
        A scalar ≥ 0; 0 if there are no rows.

    Raises:
        ArgumentError: if ``bound`` is unknown.
        ValueError: if the tensors have different numbers of rows.
    """
    check_one_of("bound", bound, BOUNDS)
    gradients = _as_tuple(gradient)
    rows = {len(g) for g in gradients}
    if len(rows) != 1:
        raise ValueError(f"gradient: all tensors must have equally many rows, got {sorted(rows)}")
    sums = [g.square().sum() for g in gradients]
    if as_published:
        sums = [s / max(math.prod(g.shape[2:]), 1) for s, g in zip(sums, gradients, strict=True)]
    information = torch.stack(sums).sum() / max(rows.pop(), 1)
    return information / loss.clamp(min=FLOOR) if bound == "entropy" else information


def functional_entropy_penalty(
    scores: Tensor, norm: float = 2.0, method: str = "max_ent"
) -> Tensor:
    """Make the term, not yet weighted, of the modalities' information.

    Args:
        scores: (M,), I_m ≥ 0.
        norm: p in [1, ∞].
        method: "max_ent" gives ``|1/scores|_p``, where scores count as at least 1e-12; "min_ent"
            gives ``|scores|_p``; "max_ent_minus" gives ``0.1 - |scores|_p``.

    Returns:
        A scalar. For scores of zero it is finite, and so is its gradient, 0 with "max_ent".

    Raises:
        ArgumentError: if ``norm`` or ``method`` is out of its range.
        ValueError: if ``scores`` has another shape.
    """
    _check_norm(norm)
    check_one_of("method", method, METHODS)
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"scores must have shape (M,) with M ≥ 1, got {tuple(scores.shape)}")
    if method == "max_ent":
        scores = scores.clamp(min=FLOOR)
        # Powers of 1 / smallest may overflow, so it stays out of the norm.
        smallest = scores.detach().min()
        return torch.linalg.vector_norm(smallest / scores, norm) / smallest
    size = torch.linalg.vector_norm(scores, norm)
    return size if method == "min_ent" else 0.1 - size


# ------------------------------------------------------------------------- samples and their noise


def repeat_samples(x: Tensor, samples: int) -> Tensor:
    """Copy x (B, …) to (B·n, …), the copies of a sample one after another.

    Raises:
        ArgumentError: if ``samples``, n, is not a positive integer.
    """
    check_positive_int(samples=samples)
    return x.repeat_interleave(samples, dim=0)


def expand_target(
    logits: Tensor, samples: int, target: str = "softmax", detach: bool = True
) -> Tensor:
    """Make the targets of noisy copies from the clean logits.

    Args:
        logits: (B, …), of the clean samples.
        samples: n ≥ 1.
        target: "softmax" over the last dimension, or "sigmoid".
        detach: keep gradients from the logits.

    Returns:
        (B·n, …) in [0, 1].

    Raises:
        ArgumentError: if ``samples`` or ``target`` is out of its range.
    """
    check_one_of("target", target, TARGETS)
    logits = logits.detach() if detach else logits
    clean = logits.softmax(dim=-1) if target == "softmax" else logits.sigmoid()
    return repeat_samples(clean, samples)


def perturb(
    features: Tensor, samples: int, mask: Tensor | None = None, as_published: bool = False
) -> Tensor:
    """Copy features and add noise of the size of :func:`noise_scale`.

    Args:
        features: (B, …), floating point. They get gradients; the size of the noise gets none.
        samples: n ≥ 1.
        mask: True where noise is added, see :func:`noise_scale`; None for everywhere.
        as_published: take the size of the noise over the B·n copies, and gradients of it. It is 0
            where one sample alone has an element.

    Returns:
        (B·n, …), the copies of a sample one after another.

    Raises:
        ArgumentError: if ``samples`` is not a positive integer.
        ValueError: if the mask does not fit.
    """
    rows = repeat_samples(features, samples)
    noise = torch.randn_like(rows.detach())
    if as_published:
        mask = torch.ones_like(features, dtype=torch.bool) if mask is None else mask
        mask = repeat_samples(_expanded_mask("mask", mask, features), samples)
        scale, _ = _deviation(rows, mask, [0])
        return rows + noise * scale.where(mask, torch.zeros_like(scale))
    scale = noise_scale(features, mask)
    return rows + noise * (repeat_samples(scale, samples) if mask is not None else scale)


def noise_scale(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take the unbiased standard deviation of each element over the batch.

    An element that one sample alone has (B = 1, or the mask) gets the standard deviation over this
    sample's own elements instead, or 0 if there is one only.

    Args:
        features: (B, …), floating point.
        mask: bool, with the leading dimensions of the features, or with all of them or 1. Elements
            where it is False get 0 and do not count.

    Returns:
        Without gradient; of the features' shape if there is a mask, otherwise broadcast to it.

    Raises:
        ValueError: if the features are not floating point, or the mask does not fit them.
    """
    if not features.is_floating_point():
        raise ValueError(f"features must be of floating point, got {features.dtype}")
    features = features.detach()
    if mask is None and len(features) != 1:
        return features.std(dim=0, keepdim=True) if len(features) else features[:0].sum(0)
    if mask is None:
        mask = torch.ones_like(features, dtype=torch.bool)
    else:
        mask = _expanded_mask("mask", mask, features)
    own_dims = list(range(1, features.dim()))
    over_batch, count = _deviation(features, mask, [0])
    own = _deviation(features, mask, own_dims)[0] if own_dims else torch.zeros_like(features)
    return torch.where(count > 1, over_batch, own).masked_fill(~mask, 0)


def _deviation(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """The unbiased deviation of the selected elements, or 0, and their number."""
    count = mask.sum(dims, keepdim=True)
    mean = x.masked_fill(~mask, 0).sum(dims, keepdim=True) / count.clamp(min=1)
    squares = (x - mean).masked_fill(~mask, 0).square().sum(dims, keepdim=True)
    # The root has no finite gradient at 0.
    constant = squares == 0
    variance = squares.masked_fill(constant, 1) / (count - 1).clamp(min=1)
    return variance.sqrt().masked_fill(constant, 0), count


# ---------------------------------------------------------------------- what the information bounds


def functional_entropy(samples: Tensor) -> Tensor:
    """Take the entropy E[f log f] - E[f] log E[f] of each function, and the mean of all.

    Args:
        samples: (R, N), N values f ≥ 0 of each of R functions. They are divided by their sum.

    Returns:
        A scalar ≥ 0; 0 for constant functions.

    Raises:
        ValueError: if ``samples`` does not have two dimensions.
    """
    _check_two_dimensions(samples)
    f = samples / samples.sum(dim=1, keepdim=True).clamp(min=FLOOR)
    mean = f.mean(dim=1)
    return (torch.special.xlogy(f, f).mean(dim=1) - torch.special.xlogy(mean, mean)).mean()


def functional_variance(samples: Tensor) -> Tensor:
    """Take the unbiased variance of each function, and the mean of all.

    Args:
        samples: (R, N), N ≥ 2 values of each of R functions.

    Returns:
        A scalar ≥ 0.

    Raises:
        ValueError: if ``samples`` does not have two dimensions.
    """
    _check_two_dimensions(samples)
    return samples.var(dim=1).mean()


# ------------------------------------------------------------------------------------------ helpers


def _attention_differentiable_twice() -> AbstractContextManager[None]:
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # PyTorch 2.1 and 2.2
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


def _as_tuple(features: Features) -> tuple[Tensor, ...]:
    return (features,) if isinstance(features, Tensor) else tuple(features)


def _expanded_mask(name: str, mask: Tensor, features: Tensor) -> Tensor:
    """The mask in the shape of the features."""
    _check_mask(name, mask)
    missing = features.dim() - mask.dim()
    if missing >= 0:
        expanded = mask.reshape(mask.shape + (1,) * missing)
        if len(mask) == len(features) and _can_expand(expanded, features.shape):
            return expanded.expand(features.shape)
    raise ValueError(
        f"{name} must have the leading dimensions of the features {tuple(features.shape)}, got "
        f"{tuple(mask.shape)}"
    )


def _can_expand(x: Tensor, shape: Sequence[int]) -> bool:
    return all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))


def _check_features(name: str, features: Features, mask: Features | None, batch: int) -> None:
    tensors = _as_tuple(features)
    if not tensors:
        raise ValueError(f"modalities[{name!r}] has no tensor")
    for x in tensors:
        if not x.is_floating_point():
            raise ValueError(f"modalities[{name!r}] must be of floating point, got {x.dtype}")
        if not x.dim() or len(x) != batch:
            raise ValueError(
                f"modalities[{name!r}] must have as many rows as the logits, {batch}, got shape "
                f"{tuple(x.shape)}"
            )
    if mask is None:
        return
    masks = _as_tuple(mask)
    if isinstance(features, Tensor) != isinstance(mask, Tensor) or len(masks) != len(tensors):
        raise ValueError(
            f"masks[{name!r}] must be a tensor for a tensor, and for a sequence one of equal "
            f"length, got {len(masks)} for {len(tensors)}"
        )
    for m, x in zip(masks, tensors, strict=True):
        _expanded_mask(f"masks[{name!r}]", m, x)


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool or not mask.dim():
        raise ValueError(
            f"{name} must be a tensor of bool with the batch first, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )


def _check_two_dimensions(samples: Tensor) -> None:
    if samples.dim() != 2:
        raise ValueError(f"samples must have shape (R, N), got {tuple(samples.shape)}")


def _check_norm(norm: float) -> None:
    if type(norm) not in (int, float) or not norm >= 1:
        raise ArgumentError("norm", f"must be a number p ≥ 1, got {norm!r}")
