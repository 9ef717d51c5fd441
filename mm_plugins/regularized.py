"""Detectors with auxiliary losses that differentiate through them: AMC and functional entropy.

In a config, on any of MMDetection's own::

    custom_imports = dict(imports=['mm_plugins'])
    model = dict(type='RegularizedDetector', detector='GroundingDINO',
                 attention_mask_consistency=dict(),
                 functional_entropy=dict(weight=1e-10))

Attention mask consistency (arXiv:2206.15462) is for any detector whose head scores phrases or
classes: GLIP, Grounding DINO, Faster R-CNN, RetinaNet, DETRs. Functional entropy regularization
(arXiv:2010.10802) is for the two that read a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.detectors import GLIP, BaseDetector, GroundingDINO
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub, print_log
from mmengine.structures import InstanceData
from torch import Tensor

from mm_plugins.activations import Activation, Recorded
from mm_plugins.grounding.modalities import GLIPModalities, GroundingDINOModalities
from mm_plugins.grounding.text_models import text_model_is_there
from mm_plugins.overlay import Overlay, detector_class, lay_over
from mm_plugins.scores import Scores, phrase_score
from mm_plugins.second_derivatives import second_derivatives
from plugin_core import AttentionMaskConsistency, FunctionalEntropyRegularizer
from plugin_core.inspection.attention_maps import Frame
from plugin_core.methods.attention_mask_consistency import ScoredRegion, check_every


@MODELS.register_module(name="RegularizedDetector")
def build_regularized_detector(
    detector: str | type[BaseDetector],
    attention_mask_consistency: dict[str, Any] | None = None,
    functional_entropy: dict[str, Any] | None = None,
    heatmap: dict[str, Any] | None = None,
    **kwargs: Any,
) -> BaseDetector:
    """A detector with auxiliary losses; it has the parameters of the plain one, by their names.

    Args:
        detector: the type of the detector, as it stands in the config without the losses.
        attention_mask_consistency: arguments of
            :class:`plugin_core.AttentionMaskConsistency`; None for
            no such loss. In the log it is ``loss_amc_mean`` and ``loss_amc_max``.
        functional_entropy: arguments of :func:`functional_entropy_loss`; None for no such loss. In
            the log it is ``loss_functional_entropy``, with ``information_image`` and
            ``information_text``: how much the detector draws from either.
        heatmap: ``activation`` and ``levels`` of :class:`mm_plugins.activations.Activation`, from
            which heatmaps are made, and ``in_test``: whether predictions have heatmaps of what an
            image is annotated with, as ``PointingGameMetric`` needs them.
        **kwargs: of the detector.

    Raises:
        ValueError: if there is no such detector, it does not fit a loss, its text model is missing,
            or an argument is wrong.
    """
    made = lay_over(detector_class(detector), _RegularizedDetector)
    return made(
        attention_mask_consistency=attention_mask_consistency,
        functional_entropy=functional_entropy,
        heatmap=heatmap,
        **kwargs,
    )


class _RegularizedDetector(Overlay):
    prefix = "Regularized"

    def __init__(
        self,
        *args: Any,
        attention_mask_consistency: dict[str, Any] | None,
        functional_entropy: dict[str, Any] | None,
        heatmap: dict[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        text_model = (kwargs.get("language_model") or {}).get("name")
        with text_model_is_there(text_model, "language_model.name"):
            super().__init__(*args, **kwargs)
        self._steps = 0
        self._warned: set[str] = set()
        self.heatmap_settings, self._in_test = _heatmap_settings(heatmap)
        self._amc: AttentionMaskConsistency | None = None
        self._entropy: FunctionalEntropyRegularizer | None = None
        if attention_mask_consistency is not None:
            with _named("attention_mask_consistency"):
                self._amc = AttentionMaskConsistency(**attention_mask_consistency)
        if attention_mask_consistency is not None or self._in_test:
            Scores(self), self._activation()  # to raise what is wrong now
        if self._in_test and (self.test_cfg or {}).get("chunked_size", -1) > 0:
            raise ValueError(
                "heatmap.in_test: a text in chunks has no heatmaps; set test_cfg.chunked_size=-1"
            )
        if functional_entropy is not None:
            with _named("functional_entropy"):
                self._entropy, self._entropy_every = functional_entropy_loss(**functional_entropy)
            self._modalities()
        if attention_mask_consistency is not None or functional_entropy is not None:
            _check_checkpoints(self)

    # What refers to the detector is made when it is needed, so that copies are of their own.

    def _activation(self) -> Activation:
        return Activation(self, **self.heatmap_settings)

    def _modalities(self) -> GroundingDINOModalities | GLIPModalities:
        if isinstance(self, GroundingDINO):
            return GroundingDINOModalities(self)
        if isinstance(self, GLIP):
            return GLIPModalities(self)
        raise ValueError(
            f"functional_entropy: {type(self).__bases__[1].__name__} does not read a text; it is "
            "for GroundingDINO and GLIP"
        )

    # --- training ------------------------------------------------------------------------------- #

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Any]:
        if torch.compiler.is_compiling():
            raise ValueError(
                "RegularizedDetector: a compiled training has no second derivatives; leave compile "
                "out of the config"
            )
        for sample in batch_data_samples:
            self._drop_boxes_without_text(sample)
        step = MessageHub.get_current_instance().get_info("iter", self._steps)
        self._steps += 1
        amc = self._amc if self._amc is not None and step % self._amc.every == 0 else None
        entropy = self._entropy
        if entropy is not None and step % self._entropy_every:
            entropy = None
        plain = partial(super().loss, batch_inputs, batch_data_samples)
        if not torch.is_grad_enabled():
            return plain()
        if entropy is not None:
            with self._modalities().record() as modalities:
                losses = self._loss_with_amc(amc, plain, batch_inputs, batch_data_samples)
            with second_derivatives(self):
                term, information = modalities.regularize(entropy)
            losses["loss_functional_entropy"] = term
            losses |= {f"information_{name}": value for name, value in information.items()}
            return losses
        return self._loss_with_amc(amc, plain, batch_inputs, batch_data_samples)

    def _drop_boxes_without_text(self, sample: DetDataSample) -> None:
        """Leave boxes out whose phrase is no part of the text, on which tokenizing would fail."""
        spans, boxes = sample.get("tokens_positive"), sample.get("gt_instances")
        if not isinstance(spans, dict) or boxes is None or not len(boxes):
            return
        length = len(sample.text)
        fits = [
            bool(spans.get(label))
            and all(0 <= start < end <= length for start, end in spans[label])
            for label in boxes.labels.tolist()
        ]
        if not all(fits):
            label = boxes.labels[fits.index(False)].item()
            self._warn(
                "text",
                f"image {sample.get('img_path', sample.get('img_id'))}: the spans "
                f"{spans.get(label)} of phrase {label} are no part of its text {sample.text!r}, "
                "its boxes are left out; spans are [start, end] in characters",
            )
            sample.gt_instances = boxes[torch.tensor(fits, device=boxes.labels.device)]

    def _loss_with_amc(
        self,
        amc: AttentionMaskConsistency | None,
        plain: Callable[[], dict[str, Any]],
        batch_inputs: Tensor,
        samples: list[DetDataSample],
    ) -> dict[str, Any]:
        if amc is None:
            return plain()
        size = (batch_inputs.shape[2], batch_inputs.shape[3])
        scores = Scores(self)
        with self._activation().record(len(samples)) as recorded, scores.record() as logits_of:
            with second_derivatives(self, wanted=lambda: bool(recorded)):
                losses = plain()
            regions = [
                self._scored_regions(sample, logits, scores)
                for sample, logits in zip(samples, logits_of(len(samples)), strict=True)
            ]
            terms = amc(regions, recorded.heatmaps, size)
            # Of a batch without phrases they are zeros of no device.
            return losses | {name: term.to(batch_inputs.device) for name, term in terms.items()}

    def _scored_regions(
        self, sample: DetDataSample, logits: Tensor, scores: Scores
    ) -> list[ScoredRegion]:
        height, width = sample.img_shape[:2]
        name = sample.get("img_path", sample.get("img_id"))
        what = "phrase" if scores.reads_text else "class"
        regions = []
        for phrase in scores.phrases(sample, logits):
            limit = phrase.boxes.new_tensor([width, height]).repeat(2)
            boxes = phrase.boxes.clamp(min=0).minimum(limit)
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
            if not len(boxes):
                self._warn(
                    "boxes",
                    f"image {name}: the boxes of {what} {phrase.label} are outside of the image "
                    f"({width}×{height}): {phrase.boxes.tolist()}; it has no part in the loss",
                )
            elif len(logits) and not phrase.columns:
                self._warn(
                    "tokens",
                    f"image {name}: {what} {phrase.label} has no token in the text "
                    f"{sample.get('text', '')!r}, or behind the last that "
                    "language_model.max_tokens lets in; it has no part in the loss",
                )
            elif len(logits):
                regions.append(ScoredRegion(phrase_score(logits, phrase.columns), boxes))
        return regions

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            print_log(f"{text} (further such images are not named)", "current", 30)

    # --- evaluation ----------------------------------------------------------------------------- #

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], rescale: bool = True
    ) -> list[DetDataSample]:
        if not self._in_test:
            return super().predict(batch_inputs, batch_data_samples, rescale)
        scores = Scores(self)
        with (
            torch.enable_grad(),
            self._activation().record(len(batch_data_samples)) as recorded,
            scores.record() as logits_of,
        ):
            results = super().predict(batch_inputs, batch_data_samples, rescale)
            recorded.differentiate.create_graph = False
            padded = (batch_inputs.shape[2], batch_inputs.shape[3])
            self._add_heatmaps(results, logits_of(len(results)), scores, recorded, padded)
        for result in results:
            for name, value in result.pred_instances.items():
                if isinstance(value, Tensor):
                    result.pred_instances[name] = value.detach()
        return results

    def _add_heatmaps(
        self,
        results: Sequence[DetDataSample],
        logits: Sequence[Tensor],
        scores: Scores,
        recorded: Recorded,
        padded: tuple[int, int],
    ) -> None:
        phrases = [
            [p for p in scores.phrases(result, of_image) if p.columns]
            for result, of_image in zip(results, logits, strict=True)
        ]
        found: list[list[Tensor]] = [[] for _ in results]
        for turn in range(max(map(len, phrases), default=0)):
            rows = [i for i, of_image in enumerate(phrases) if turn < len(of_image)]
            score = torch.stack([phrase_score(logits[i], phrases[i][turn].columns) for i in rows])
            heat = recorded.heatmaps(score.sum())
            for i in rows:
                result = results[i]
                frame = Frame(result.ori_shape[:2], result.img_shape[:2], padded)
                found[i].append(frame.over_image(heat[i]))
        for result, of_image, heats in zip(results, phrases, found, strict=True):
            size = result.ori_shape[:2]
            result.phrase_heatmaps = InstanceData(
                labels=torch.tensor([phrase.label for phrase in of_image], dtype=torch.long),
                heatmaps=torch.cat(heats) if heats else torch.zeros(0, *size),
            )


def _check_checkpoints(detector: Any) -> None:
    """Refuse activation checkpoints where gradients are differentiated."""
    for name, module, attribute in (
        ("encoder.num_cp", getattr(detector, "encoder", None), "num_cp"),
        ("bbox_head.use_checkpoint", _last(detector, "bbox_head", "head"), "use_checkpoint"),
    ):
        if getattr(module, attribute, 0) > 0:
            raise ValueError(
                f"{name}: gradients are differentiated, which activation checkpoints do not "
                f"allow, got {getattr(module, attribute)!r}; set it to 0 or False"
            )


def _last(module: Any, *names: str) -> Any:
    for name in names:
        module = getattr(module, name, None)
    return module


def functional_entropy_loss(
    samples: int = 3,
    bound: str = "entropy",
    norm: float = 2.0,
    method: str = "max_ent",
    weight: float = 1e-10,
    every: int = 1,
) -> tuple[FunctionalEntropyRegularizer, int]:
    """The regularizer of a detector's token logits, and in every how many steps it is taken.

    Args:
        samples: as :class:`plugin_core.FunctionalEntropyRegularizer` takes it.
        bound: as there.
        norm: as there.
        method: as there.
        weight: as there.
        every: number of steps in one of which it is taken.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_every(every)
    regularizer = FunctionalEntropyRegularizer(
        samples, bound, norm, method, weight, loss=_sum_of_logits, target="sigmoid"
    )
    return regularizer, every


def _sum_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """A sum, since a mean over all positions of an image would make each one's gradient vanish."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def _heatmap_settings(heatmap: dict[str, Any] | None) -> tuple[dict[str, Any], bool]:
    settings = dict(heatmap or {})
    in_test = settings.pop("in_test", False)
    if unknown := sorted(set(settings) - {"activation", "levels"}):
        raise ValueError(
            f"heatmap: there is no setting {unknown[0]!r}; there are activation, levels, in_test"
        )
    return {"name": settings.get("activation"), "levels": settings.get("levels")}, in_test


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Say in errors which setting's argument is wrong."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{setting}: {error}") from error
