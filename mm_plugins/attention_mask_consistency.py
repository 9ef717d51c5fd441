"""Attention mask consistency (AMC, arXiv:2206.15462) as an auxiliary loss of a detector.

In a config::

    custom_imports = dict(imports=['mm_plugins'])
    model = dict(type='PluginGroundingDINO', attention_mask_consistency=dict())

The gradient heatmap of a phrase's or a class's best score shall lie in its boxes
(``plugin_core/methods/attention_mask_consistency.py``). It is for detectors whose head scores
phrases or classes: GLIP, Grounding DINO, R-CNNs, RetinaNet, DETRs. Predictions may have heatmaps,
too, for ``PointingGameMetric``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mm_plugins.activations import Activation, Recorded
from mm_plugins.auxiliary_losses import AuxiliaryLossMixin
from mm_plugins.denoising import decode_apart, has_denoising_queries
from mm_plugins.scores import Logits, Phrase, Scores, phrase_score
from mm_plugins.second_derivatives import second_derivatives
from mm_plugins.settings import build_from
from plugin_core import AttentionMaskConsistency, BatchFormer
from plugin_core.errors import ArgumentError
from plugin_core.inspection.attention_maps import Frame
from plugin_core.methods.attention_mask_consistency import ScoredRegion


class AMCMixin(AuxiliaryLossMixin):
    """Adds AMC's losses to a detector: ``class MyDETR2(AMCMixin, MyDETR)``.

    With BatchFormerV2 the losses are the first stream's: the images as they are in evaluation.

    Args:
        attention_mask_consistency: arguments of :class:`plugin_core.AttentionMaskConsistency`; None
            for no such loss. In the log it is ``loss_amc_mean`` and ``loss_amc_max``.
        heatmap: ``activation`` and ``levels`` of :class:`mm_plugins.activations.Activation`, from
            which heatmaps are made, and ``in_test``: whether predictions have heatmaps of what an
            image is annotated with, as ``PointingGameMetric`` needs them.

    Raises:
        ArgumentError: if the detector has no scores to explain, or a setting is wrong.
    """

    place = 1

    def __init__(
        self,
        *args: Any,
        attention_mask_consistency: dict[str, Any] | None = None,
        heatmap: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.heatmap_settings = build_from("heatmap", _heatmap_settings, heatmap or {})
        self._in_test: bool = self.heatmap_settings.pop("in_test")
        self._amc: AttentionMaskConsistency | None = None
        self._hidden: list[Tensor] | None = None  # of a step's matching queries, decoded apart
        if attention_mask_consistency is not None:
            self._amc = build_from(
                "attention_mask_consistency", AttentionMaskConsistency, attention_mask_consistency
            )
            self._expect_auxiliary_loss()
            self._refuse_gathering()
        if self._amc is not None or self._in_test:
            Scores(self)  # to raise what is wrong now
            self._activation().check_checkpoints()
        if self._in_test and (self.test_cfg or {}).get("chunked_size", -1) > 0:
            raise ArgumentError(
                "heatmap.in_test",
                "must be False where a text is read in chunks, got True; set "
                "test_cfg.chunked_size=-1",
            )

    def _refuse_gathering(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, BatchFormer) and module.gather:
                in_encoder = module in (getattr(self, "batchformers", None) or {}).values()
                where = "batchformer" if in_encoder else re.sub(r"\.(\d+)", r"[\1]", name)
                raise ArgumentError(
                    f"{where}.gather",
                    "must be False with attention_mask_consistency, got True; processes differ in "
                    "how many phrases they differentiate, and would wait for one another",
                )

    def _activation(self) -> Activation:
        # Made when it is needed, so that a copy of the detector has its own
        return Activation(self, **self.heatmap_settings)

    # --- training ------------------------------------------------------------------------------- #

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Any]:
        if self._amc is None or not self._is_due(self._amc.every):
            return super().loss(batch_inputs, batch_data_samples)
        images, size = len(batch_data_samples), (batch_inputs.shape[2], batch_inputs.shape[3])
        scores = Scores(self)
        with self._activation().record(images) as recorded, scores.record() as logits_of:
            in_head = recorded.of.name.startswith("roi_head.")
            regional = self.roi_head if scores.is_of_each_region and not in_head else None
            twice = second_derivatives(self, wanted=lambda: bool(recorded), without=regional)
            with twice, self._apart() as hidden:
                losses = super().loss(batch_inputs, batch_data_samples)
            logits = logits_of(images, *hidden)
            phrases = [
                self._amc.choose(self._visible_phrases(sample, of_image, scores))
                for sample, of_image in zip(batch_data_samples, logits, strict=True)
            ]
            regions = [
                [ScoredRegion(score, phrase.boxes) for score, phrase in zip(*found, strict=True)]
                for found in zip(
                    self._best(phrases, logits, logits_of if regional is not None else None),
                    phrases,
                    strict=True,
                )
            ]
            terms = self._amc(regions, recorded.heatmaps, size)
            # Without a phrase in the batch they are zeros of no device.
            return losses | {name: term.to(batch_inputs.device) for name, term in terms.items()}

    @contextmanager
    def _apart(self) -> Iterator[list[Tensor]]:
        """Decode matching queries apart; gives the list that gets their last hidden states."""
        self._hidden = [] if has_denoising_queries(self) else None
        try:
            yield [] if self._hidden is None else self._hidden
        finally:
            self._hidden = None

    def forward_decoder(self, **inputs: Any) -> dict[str, Any]:
        decode: Any = super().forward_decoder
        if self._hidden is None or inputs.get("dn_mask") is None:
            outputs: dict[str, Any] = decode(**inputs)
            return outputs
        outputs, hidden = decode_apart(decode, self.decoder, inputs, self.num_queries)
        self._hidden.append(hidden)
        return outputs

    def _best(
        self, phrases: list[list[Phrase]], logits: list[Tensor], regional: Logits | None
    ) -> list[list[Tensor]]:
        """The phrases' scores; the best regions' are computed again where these are given."""
        if any(phrases) and regional is not None:
            rows = [
                [int(x[:, phrase.columns].mean(1).argmax()) for phrase in of_image]
                for x, of_image in zip(logits, phrases, strict=True)
            ]
            with second_derivatives(self):
                again = regional.of_regions(rows)
            return [
                [phrase_score(x[None], phrase.columns) for x, phrase in zip(*found, strict=True)]
                for found in zip(again, phrases, strict=True)
            ]
        return [
            [phrase_score(x, phrase.columns) for phrase in of_image]
            for x, of_image in zip(logits, phrases, strict=True)
        ]

    def _visible_phrases(
        self, sample: DetDataSample, logits: Tensor, scores: Scores
    ) -> list[Phrase]:
        """The phrases that have tokens, and boxes in the image; of others it warns."""
        height, width = sample.img_shape[:2]
        name = sample.get("img_path", sample.get("img_id"))
        kind = "phrase" if scores.reads_text else "class"
        found = []
        for phrase in scores.phrases(sample, logits):
            limit = phrase.boxes.new_tensor([width, height]).repeat(2)
            boxes = phrase.boxes.clamp(min=0).minimum(limit)
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
            if not len(boxes):
                self._warn(
                    "boxes",
                    f"image {name}: the boxes of {kind} {phrase.label} are outside of the image "
                    f"({width}×{height}): {phrase.boxes.tolist()}; it has no part in the loss",
                )
            elif len(logits) and not phrase.columns:
                self._warn(
                    "tokens",
                    f"image {name}: {kind} {phrase.label} has no token in the text "
                    f"{sample.get('text', '')!r}, or behind the last that "
                    "language_model.max_tokens lets in; it has no part in the loss",
                )
            elif len(logits):
                found.append(replace(phrase, boxes=boxes))
        return found

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


def _heatmap_settings(
    activation: str | None = None, levels: Sequence[int] | None = None, in_test: bool = False
) -> dict[str, Any]:
    return {"name": activation, "levels": levels, "in_test": in_test}
