"""Functional entropy regularization (arXiv:2010.10802) of detectors that read a text.

In a config::

    custom_imports = dict(imports=['mm_plugins'])
    model = dict(type='PluginGroundingDINO', functional_entropy=dict(weight=1e-10))

The modalities are the image features and text embeddings that the detector fuses. A detector's
scores of queries cannot be compared between noisy copies of an image, as queries are sorted by
score. The logits of all positions can: those by which Grounding DINO chooses its queries, and those
of GLIP's anchors. Each logit is a decision of its own: targets are sigmoids in place of the paper's
softmax over answers, and the loss is the sum over the logits. So neither the information nor a
useful weight compares between the two detectors. GLIP's images have noise on their padding, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.detectors import GLIP, GroundingDINO
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mm_plugins.auxiliary_losses import AuxiliaryLossMixin
from mm_plugins.batchformer import MAP_SIZE
from mm_plugins.mixins import not_for
from mm_plugins.second_derivatives import second_derivatives
from mm_plugins.settings import build_from
from plugin_core import FunctionalEntropyRegularizer
from plugin_core.errors import check_positive_int
from plugin_core.inspection.recorder import record_calls

# What a module was called with, by name, and what it gave
Recording = tuple[dict[str, Any], Any]
Term = tuple[Tensor, dict[str, Tensor]]


class FunctionalEntropyMixin(AuxiliaryLossMixin):
    """Adds functional entropy regularization to a Grounding DINO or a GLIP.

    With BatchFormerV2 it regularizes the first stream: the images as they are in evaluation.

    Args:
        functional_entropy: arguments of :func:`functional_entropy_loss`; None for no such loss. In
            the log it is ``loss_functional_entropy``, with ``information_image`` and
            ``information_text``: how much the detector draws from either.

    Raises:
        ArgumentError: if the detector reads no text, or an argument is wrong.
    """

    place = 0

    def __init__(
        self, *args: Any, functional_entropy: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._entropy: FunctionalEntropyRegularizer | None = None
        self._recordings: list[Recording] | None = None  # of a step's forward_encoder
        if functional_entropy is None:
            return
        if not isinstance(self, (GroundingDINO, GLIP)):
            raise not_for(self, "functional_entropy")
        self._entropy, self._entropy_every = build_from(
            "functional_entropy", functional_entropy_loss, functional_entropy
        )
        self._expect_auxiliary_loss()

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Any]:
        if self._entropy is None or not self._is_due(self._entropy_every):
            return super().loss(batch_inputs, batch_data_samples)
        with self._record() as recording:
            losses = super().loss(batch_inputs, batch_data_samples)
        with second_derivatives(self):
            term, information = self._regularize(self._entropy, recording())
        return (
            losses
            | {"loss_functional_entropy": term}
            | {f"information_{name}": value for name, value in information.items()}
        )

    def forward_encoder(self, **inputs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = super().forward_encoder(**inputs)
        if self._recordings is not None:
            self._recordings.append((inputs, outputs))
        return outputs

    @contextmanager
    def _record(self) -> Iterator[Callable[[], Recording]]:
        """Record what fuses image and text in a forward pass; gives what then reads it."""
        if isinstance(self, GLIP):
            with _record_head(self.bbox_head) as recording:
                yield recording
            return
        recordings = self._recordings = []
        try:
            yield recordings.pop
        finally:
            self._recordings = None

    def _regularize(self, entropy: FunctionalEntropyRegularizer, recording: Recording) -> Term:
        """The term, and the information of image and text."""
        of_detector = _regularize_glip if isinstance(self, GLIP) else _regularize_grounding_dino
        return of_detector(self, entropy, *recording)


def functional_entropy_loss(
    samples: int = 3,
    bound: str = "entropy",
    norm: float = 2.0,
    method: str = "max_ent",
    weight: float = 1e-10,
    every: int = 1,
    as_published: bool = False,
) -> tuple[FunctionalEntropyRegularizer, int]:
    """The regularizer of a detector's token logits, and in every how many steps it is taken.

    Args:
        samples: as :class:`plugin_core.FunctionalEntropyRegularizer` takes it.
        bound: as there.
        norm: as there.
        method: as there.
        weight: as there.
        every: number of steps in one of which it is taken, at least 1.
        as_published: as there. The second dimension, whose squares are added up, is that of the
            positions in Grounding DINO and of texts, and that of the channels in GLIP's pyramid.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_positive_int(every=every)
    regularizer = FunctionalEntropyRegularizer(
        samples,
        bound,
        norm,
        method,
        weight,
        loss=_sum_over_logits,
        target="sigmoid",
        as_published=as_published,
    )
    return regularizer, every


def _sum_over_logits(logits: Tensor, targets: Tensor) -> Tensor:
    # A mean over all positions of an image would make each position's gradient vanish.
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def _regularize_grounding_dino(
    detector: Any, entropy: FunctionalEntropyRegularizer, inputs: dict[str, Any], outputs: Any
) -> Term:
    """Perturb the encoder's inputs: the feature maps in a row, and the text's embeddings."""
    inputs = {name: value for name, value in inputs.items() if name != MAP_SIZE}
    image, padding, text = inputs["feat"], inputs["feat_mask"], inputs["text_dict"]
    words = text["text_token_mask"]
    scores = detector.bbox_head.cls_branches[detector.decoder.num_layers]

    def logits(memory: Tensor, memory_text: Tensor) -> Tensor:
        proposals, _ = detector.gen_encoder_output_proposals(
            memory, padding, inputs["spatial_shapes"]
        )
        found: Tensor = scores(proposals, memory_text, words)[..., : words.shape[1]]
        return found.masked_fill(~words[:, None], 0.0)  # instead of -inf

    def run(noisy: dict[str, Any]) -> Tensor:
        noisy_text = text | {"embedded": noisy["text"]}
        encoded = detector.forward_encoder(
            **inputs | {"feat": noisy["image"], "text_dict": noisy_text}
        )
        return logits(encoded["memory"], encoded["memory_text"])

    visible = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    if padding is not None:
        visible = ~padding
    first = slice(len(image))  # the first stream, where BatchFormerV2 makes two
    with torch.set_grad_enabled(entropy.as_published):  # otherwise no gradient passes through it
        clean = logits(outputs["memory"][first], outputs["memory_text"][first])
    return entropy(
        _copy_by_copy(run, entropy.samples),
        {"image": image, "text": text["embedded"]},
        clean,
        masks={"image": visible, "text": words},
        valid=visible[:, :, None] & words[:, None],
    )


@contextmanager
def _record_head(head: nn.Module) -> Iterator[Callable[[], Recording]]:
    """Record what GLIP's head is called with, before it overwrites the text, and what it gives."""
    inputs: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.update(features=tuple(args[0]), text=dict(args[1]))

    handle = head.register_forward_pre_hook(note)
    try:
        with record_calls([head]) as calls:
            yield lambda: (inputs, calls[-1].output)
    finally:
        handle.remove()


def _regularize_glip(
    detector: Any, entropy: FunctionalEntropyRegularizer, inputs: dict[str, Any], outputs: Any
) -> Term:
    """Perturb the head's inputs: the feature pyramid's levels, and the text's hidden states."""
    head, text = detector.bbox_head, inputs["text"]
    read = "hidden" if head.head.early_fuse else "embedded"
    words = text["masks"] > 0

    def run(noisy: dict[str, Any]) -> Tensor:
        logits, _, _ = head(noisy["image"], text | {read: noisy["text"]})
        return torch.cat(logits, dim=1)

    return entropy(
        _copy_by_copy(run, entropy.samples),
        {"image": inputs["features"], "text": text[read]},
        torch.cat(outputs[0], dim=1),
        masks={"text": words},
        valid=words[:, None],
    )


def _copy_by_copy(
    run: Callable[[dict[str, Any]], Tensor], samples: int
) -> Callable[[dict[str, Any]], Tensor]:
    """Run one noisy copy of the batch after the other, each with the images that came together.

    Grounding DINO's text layers mask a batch's texts by one another's masks.
    """

    def run_all(noisy: dict[str, Any]) -> Tensor:
        copies = [
            run(
                {
                    name: x[k::samples]
                    if isinstance(x, Tensor)
                    else tuple(level[k::samples] for level in x)
                    for name, x in noisy.items()
                }
            )
            for k in range(samples)
        ]
        return torch.stack(copies, dim=1).flatten(0, 1)

    return run_all
