"""Functional entropy regularization (Gat et al., NeurIPS 2020, arXiv 2010.10802).

A classifier of several modalities x_1 … x_M may rest on the one that is easiest to learn from, and
ignore the others. How much it draws from x_m is bounded by a functional Fisher information, which
is measured on n noisy copies of each of the B samples (R = B·n rows):

    x̃_m  = x_m + N(0, std of x_m over the batch)          perturbed, one modality's noise each
    loss = loss(model(x̃_1 … x̃_M), softmax(clean logits))  against what the clean sample gives
    I_m  = mean over rows of |∂loss/∂x̃_m|² / loss         bound of the entropy (log-Sobolev)
    I_m  = mean over rows of |∂loss/∂x̃_m|²                bound of the variance (Poincaré)
    term = weight · |(1/I_1 … 1/I_M)|_p                   added to what is trained

so that no modality's information may be small. The loss is a mean over all rows, and a row's
gradient a part of it: I_m falls with R², and a useful weight depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.kernels.precision import in_float32

# One tensor, or several such as the levels of a feature pyramid
Features: TypeAlias = Tensor | Sequence[Tensor]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

BOUNDS = ("entropy", "variance")
METHODS = ("max_ent", "min_ent", "max_ent_minus")
TARGETS = ("softmax", "sigmoid")
# What is divided by is at least this; where it takes effect the gradient of the divisor is zero.
FLOOR = 1e-12


class FunctionalEntropyRegularizer(nn.Module):
    """A term that is large where a model draws little from one of its modalities.

    Args:
        samples: noisy copies of each sample, n ≥ 1.
        bound: ``"entropy"`` or ``"variance"``, see :func:`functional_information`.
        norm: p ≥ 1, see :func:`functional_entropy_penalty`.
        method: ``"max_ent"``, ``"min_ent"`` or ``"max_ent_minus"``, likewise.
        weight: λ ≥ 0 of the term; the default is the paper's on VQA-CP.
        loss: of logits and targets of equal shape, a scalar ≥ 0; by default the mean binary cross
            entropy with logits, as the authors take for answers.
        target: what makes targets of clean logits: ``"softmax"`` over their last dimension, or
            ``"sigmoid"`` where each logit is a decision of its own.

    Everything is computed in float32 (float64 where features are), outside of autocast. The term's
    gradient differentiates the model's backward pass: attention takes PyTorch's mathematical path,
    as the fused ones cannot be differentiated twice, and no other layer between the features and
    the logits may be one that cannot (torchvision's RoIAlign, deformable attention in CUDA).

    Raises:
        ValueError: if an argument is not one of the above.
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
    ) -> None:
        super().__init__()
        _check_samples(samples)
        _check_one_of("bound", bound, BOUNDS)
        _check_norm(norm)
        _check_one_of("method", method, METHODS)
        _check_one_of("target", target, TARGETS)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number ≥ 0, got {weight!r}")
        if loss is not None and not callable(loss):
            raise ValueError(f"loss must be a function of logits and targets, got {loss!r}")
        self.samples = samples
        self.bound = bound
        self.norm = norm
        self.method = method
        self.weight = weight
        self.loss: Loss = F.binary_cross_entropy_with_logits if loss is None else loss
        self.target = target

    def forward(
        self,
        model: Callable[[dict[str, Features]], Tensor],
        modalities: Mapping[str, Features],
        logits: Tensor,
        masks: Mapping[str, Features] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure the information of each modality, and make the term of it.

        Gradients of the term reach what ``model`` does and, through the features, what they were
        computed by; none goes through ``logits``. Under ``torch.no_grad`` it is only measured.

        Args:
            model: of perturbed features by their modalities' names, as in ``modalities`` but of
                B·n rows each and with tuples for sequences, the logits (B·n, …). A sample's rows
                follow one another, as ``torch.repeat_interleave`` puts them: what else the model
                takes of the samples, a padding mask for example, must be repeated like this
                (:func:`repeat_samples`). Layers that keep statistics will count these rows.
            modalities: features (B, …), or sequences of them, by names of your choice.
            logits: of the clean features, (B, …).
            masks: for modalities with padding, where it is not: bool (B, T) for features
                (B, T, C), see :func:`perturb`; a sequence of masks for a sequence.
            valid: which logits count, if not all: bool, of the shape of ``logits`` or of its
                leading dimensions, with 1 where it is broadcast. Logits (B, T, K) and ``valid``
                (B, T) reach ``loss`` as (number of valid, K); a ``valid`` of as many dimensions as
                the logits makes them (number of valid,).

        Returns:
            The weighted term, a scalar, and the information of each modality by its name, scalars
            without gradient. Without samples or valid logits there is nothing to measure, and all
            of it is 0.

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
            target = expand_target(in_float32(logits), self.samples, self.target)
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
        """Noisy copies with a graph to the features; gradients can be taken of them in any case."""
        tensors = _as_tuple(features)
        masks = (None,) * len(tensors) if mask is None else _as_tuple(mask)
        perturbed = [
            perturb(in_float32(x), self.samples, m) for x, m in zip(tensors, masks, strict=True)
        ]
        for x in perturbed:
            if not x.requires_grad:
                x.requires_grad_()
        return perturbed[0] if isinstance(features, Tensor) else tuple(perturbed)

    def _information(
        self, perturbed: Mapping[str, Features], loss: Tensor, create_graph: bool
    ) -> Tensor:
        """I_m of each modality, (M,), by one backward pass for all of them."""
        tensors = [_as_tuple(features) for features in perturbed.values()]
        gradients = list(
            torch.autograd.grad(
                loss,
                [x for levels in tensors for x in levels],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,  # what the model does not use informs it of nothing
            )
        )
        scores = []
        for levels in tensors:
            of_levels = [gradients.pop(0) for _ in levels]
            scores.append(functional_information(of_levels, loss, self.bound))
        return torch.stack(scores)

    def _selected(self, valid: Tensor, logits: Tensor) -> Tensor:
        """Index of the rows' logits that count."""
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
            f"method={self.method!r}, weight={self.weight:g}, target={self.target!r}"
        )


# ---------------------------------------------------------------------- from gradients to the term


def functional_information(gradient: Features, loss: Tensor, bound: str = "entropy") -> Tensor:
    """How much a model draws from a modality: I_m.

    Args:
        gradient: ∂loss/∂x̃_m (R, …), rows first, or several with R rows, whose squares add up.
        loss: scalar; used for the bound of the entropy, where it is taken as at least 1e-12.
        bound: ``"entropy"`` divides by the loss (log-Sobolev inequality), ``"variance"`` does not
            (Poincaré inequality).

    Returns:
        A scalar ≥ 0; 0 where there are no rows.

    Raises:
        ValueError: if ``bound`` is neither, or the tensors have different numbers of rows.
    """
    _check_one_of("bound", bound, BOUNDS)
    gradients = _as_tuple(gradient)
    rows = {len(g) for g in gradients}
    if len(rows) != 1:
        raise ValueError(f"gradient: all tensors must have equally many rows, got {sorted(rows)}")
    squares = torch.stack([g.square().sum() for g in gradients]).sum()
    information = squares / max(rows.pop(), 1)
    return information / loss.clamp(min=FLOOR) if bound == "entropy" else information


def functional_entropy_penalty(
    scores: Tensor, norm: float = 2.0, method: str = "max_ent"
) -> Tensor:
    """The term of the modalities' information, not yet weighted.

    Args:
        scores: I_m ≥ 0, of shape (M,).
        norm: p ≥ 1, infinity included.
        method: ``"max_ent"`` is |1/scores|_p, where scores below 1e-12 count as 1e-12;
            ``"min_ent"`` is |scores|_p; ``"max_ent_minus"`` is 0.1 - |scores|_p.

    Returns:
        A scalar. It and its gradient are finite for scores of zero, where the gradient is zero
        with ``"max_ent"``.

    Raises:
        ValueError: if ``scores`` is of another shape, or ``norm`` or ``method`` not one of these.
    """
    _check_norm(norm)
    _check_one_of("method", method, METHODS)
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"scores must have shape (M,) with M ≥ 1, got {tuple(scores.shape)}")
    if method == "max_ent":
        scores = scores.clamp(min=FLOOR)
        # 1 / smallest is taken out, as a power of it may be more than float32 can hold.
        smallest = scores.detach().min()
        return torch.linalg.vector_norm(smallest / scores, norm) / smallest
    size = torch.linalg.vector_norm(scores, norm)
    return size if method == "min_ent" else 0.1 - size


# ------------------------------------------------------------------------- samples and their noise


def repeat_samples(x: Tensor, samples: int) -> Tensor:
    """Copies (B·n, …) of x (B, …), those of a sample one after another.

    Raises:
        ValueError: if ``samples``, n, is not a positive integer.
    """
    _check_samples(samples)
    return x.repeat_interleave(samples, dim=0)


def expand_target(logits: Tensor, samples: int, target: str = "softmax") -> Tensor:
    """Targets (B·n, …) that clean logits (B, …) are for their noisy copies, without gradient.

    Args:
        logits: of the clean samples.
        samples: n ≥ 1.
        target: ``"softmax"`` over the last dimension, or ``"sigmoid"``.

    Raises:
        ValueError: if ``samples`` or ``target`` is not one of these.
    """
    _check_one_of("target", target, TARGETS)
    logits = logits.detach()
    clean = logits.softmax(dim=-1) if target == "softmax" else logits.sigmoid()
    return repeat_samples(clean, samples)


def perturb(features: Tensor, samples: int, mask: Tensor | None = None) -> Tensor:
    """Copies (B·n, …) of features (B, …) with noise of the size of :func:`noise_scale`.

    Args:
        features: of floating point; gradients pass to them, and none to the size of the noise.
        samples: n ≥ 1.
        mask: True where noise is added, as for :func:`noise_scale`; elsewhere nothing changes.

    Raises:
        ValueError: if ``samples`` is not a positive integer, or the mask does not fit.
    """
    scale = noise_scale(features, mask)
    rows = repeat_samples(features, samples)
    noise = torch.randn_like(rows.detach())
    return rows + noise * (repeat_samples(scale, samples) if mask is not None else scale)


def noise_scale(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Standard deviation of each element of features (B, …) over the batch, unbiased.

    Over one sample there is none: where B is 1, or only one sample's mask is True, the standard
    deviation over this sample's own elements stands in for it, and 0 where that is one element.

    Args:
        features: of floating point.
        mask: bool (B, …) with the leading dimensions of the features, or with as many dimensions
            as they have, and 1 where it is broadcast. Elements where it is False enter no standard
            deviation, and their own is 0.

    Returns:
        Without gradient, of the shape of the features with a mask, else to be broadcast to it.

    Raises:
        ValueError: if the features are not of floating point, or the mask does not fit them.
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
    """Unbiased, of what the mask selects, or 0; and how many elements that is."""
    count = mask.sum(dims, keepdim=True)
    mean = x.masked_fill(~mask, 0).sum(dims, keepdim=True) / count.clamp(min=1)
    squares = (x - mean).masked_fill(~mask, 0).square().sum(dims, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt(), count


# ------------------------------------------------------------- what the information is a bound of


def functional_entropy(samples: Tensor) -> Tensor:
    """Entropy E[f log f] - E[f] log E[f] of samples of functions, a mean over the functions.

    Args:
        samples: (R, N), N values f ≥ 0 of each of R functions, which are divided by their sum.

    Returns:
        A scalar ≥ 0, 0 for functions that are constant.

    Raises:
        ValueError: if ``samples`` does not have two dimensions.
    """
    _check_two_dimensions(samples)
    f = samples / samples.sum(dim=1, keepdim=True).clamp(min=FLOOR)
    mean = f.mean(dim=1)
    return (torch.special.xlogy(f, f).mean(dim=1) - torch.special.xlogy(mean, mean)).mean()


def functional_variance(samples: Tensor) -> Tensor:
    """Variance of samples of functions, unbiased, a mean over the functions.

    Args:
        samples: (R, N), N ≥ 2 values of each of R functions.

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


def _check_samples(samples: int) -> None:
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")


def _check_norm(norm: float) -> None:
    if type(norm) not in (int, float) or not norm >= 1:
        raise ValueError(f"norm must be a number p ≥ 1, got {norm!r}")


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
