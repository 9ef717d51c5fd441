"""Attention mask consistency (AMC, arXiv:2206.15462) of BLIP, as its authors have it for ALBEF.

In a config::

    custom_imports = dict(imports=["mm_plugins"])
    model = dict(type="AMCBlipRetrieval", attention_mask_consistency=dict())

BLIP succeeds ALBEF, and its text encoder fuses in the same way: the words attend to the image's
patches. The heatmap of a phrase is made of this attention in one layer, and of the gradient of a
score by it (``plugin_core/methods/attention_mask_consistency.py``):

- :class:`AMCBlipRetrieval` is the authors' model: the score is the logit that image and phrase
  match. Its other losses are the contrast of images and phrases and the matching itself; the
  authors also have ALBEF's masked words, which MMPretrain's BLIP has not.
- :class:`AMCBlipGrounding` has no such logit: it writes a box as four tokens. The score is their
  log-likelihood.

Images come with one phrase each: ``text`` and ``gt_bboxes`` (N, 4) in pixels of the network's
input, as ``RefCOCO`` gives them. Predictions have ``heatmap`` (H, W) and ``gt_bboxes`` over the
image of the file, for ``HeatmapPointingGame``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from mmpretrain.models.multimodal import BlipGrounding, BlipRetrieval
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mm_plugins.grounding.text_models import tokenizer_is_there
from mm_plugins.settings import build_from
from plugin_core import AttentionMaskConsistency, GradientHeatmap
from plugin_core.errors import ArgumentError
from plugin_core.inspection.recorder import Call, record_calls
from plugin_core.methods.attention_mask_consistency import ScoredRegion


class _AMCMixin:
    """Heatmaps, and AMC's losses, of a BLIP.

    Args:
        attention_mask_consistency: arguments of :class:`plugin_core.AttentionMaskConsistency`; None
            for no such loss. In the log it is ``loss_amc_mean`` and ``loss_amc_max``.
        heatmap_layer: of the text encoder, from 0; the default is the authors'.

    Raises:
        ArgumentError: if there is no such layer, the text model is missing, or a setting is wrong.
    """

    def __init__(
        self,
        *args: Any,
        tokenizer: dict[str, Any],
        attention_mask_consistency: dict[str, Any] | None = None,
        heatmap_layer: int = 8,
        **kwargs: Any,
    ) -> None:
        construct: Any = super().__init__
        with tokenizer_is_there(tokenizer):
            construct(*args, tokenizer=tokenizer, **kwargs)
        self._amc: AttentionMaskConsistency | None = None
        if attention_mask_consistency is not None:
            self._amc = build_from(
                "attention_mask_consistency", AttentionMaskConsistency, attention_mask_consistency
            )
        layers = self._text_encoder().encoder.layer
        if type(heatmap_layer) is not int or not 0 <= heatmap_layer < len(layers):
            raise ArgumentError(
                "heatmap_layer",
                f"must be a layer of the text encoder, from 0 to {len(layers) - 1}, "
                f"got {heatmap_layer!r}",
            )
        self.heatmap_layer = heatmap_layer

    # --- what the two models have in different places ----------------------------------------- #

    def _text_encoder(self) -> Any:
        """The one that attends to the image."""
        raise NotImplementedError

    def _vision_encoder(self) -> Any:
        raise NotImplementedError

    def _scoring(self) -> nn.Module:
        """The module whose calls :meth:`_scores` reads."""
        raise NotImplementedError

    def _scores(self, calls: Sequence[Call]) -> Tensor:
        """Each phrase's score of its image, those of the batch first."""
        raise NotImplementedError

    def _words(self, data_samples: Sequence[DataSample]) -> Tensor:
        """(B, T), 0 for padding."""
        raise NotImplementedError

    # --- training ----------------------------------------------------------------------------- #

    def loss(self, images: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        parent: Any = super()
        step = MessageHub.get_current_instance().get_info("iter", 0)
        if self._amc is None or step % self._amc.every:
            losses: dict[str, Tensor] = parent.loss(images, data_samples)
            return losses
        batch = list(data_samples)  # BLIP appends its negatives to the list
        words = self._words(batch)
        with self._record() as calls:
            losses = parent.loss(images, data_samples)
        scores = self._scores([call for call in calls if call.module is self._scoring()])
        regions = [
            [ScoredRegion(score, _boxes(sample).to(score))]
            for score, sample in zip(scores, batch, strict=False)
        ]

        def heatmaps(score: Tensor) -> Tensor:
            return self._heatmaps(score, calls, words, GradientHeatmap())

        return losses | self._amc(regions, heatmaps, (images.shape[2], images.shape[3]))

    @contextmanager
    def _record(self) -> Iterator[list[Call]]:
        """Record a forward pass: the attention over the image, its patches, and the scores."""
        attention = self._attention()
        # BERT's layers give their attention only if they are asked for it.
        handle = attention.register_forward_pre_hook(_ask_for_attention, with_kwargs=True)
        embedding = self._vision_encoder().patch_embed
        try:
            with record_calls([attention, embedding, self._scoring()]) as calls:
                yield calls
        finally:
            handle.remove()

    def _attention(self) -> Any:
        return self._text_encoder().encoder.layer[self.heatmap_layer].crossattention

    def _heatmaps(
        self, score: Tensor, calls: Sequence[Call], words: Tensor, differentiate: GradientHeatmap
    ) -> Tensor:
        """Heatmaps (B, 1, h, w) over the patches, of a sum of scores, one of each image."""
        attention_module, embedding = self._attention(), self._vision_encoder().patch_embed
        # The first call is of the images with their own phrases.
        attention = next(call.output[1] for call in calls if call.module is attention_module)
        size = next(call.output[1] for call in calls if call.module is embedding)

        def in_space(x: Tensor) -> Tensor:  # without the class token
            return x[..., -math.prod(size) :].unflatten(-1, tuple(size))

        return differentiate(score, attention, words, layout=in_space)

    # --- evaluation --------------------------------------------------------------------------- #

    def _predict_heatmaps(
        self, images: Tensor, data_samples: Sequence[DataSample], calls: Sequence[Call]
    ) -> None:
        """Add ``heatmap`` to the samples of a recorded forward pass with gradients."""
        scores = self._scores([call for call in calls if call.module is self._scoring()])
        differentiate = GradientHeatmap(create_graph=False)
        words = self._words(data_samples)
        heat = self._heatmaps(scores.sum(), calls, words, differentiate).detach()
        for sample, of_sample in zip(data_samples, heat, strict=True):
            x, y = sample.get("scale_factor", (1, 1))
            size = (round(images.shape[2] / y), round(images.shape[3] / x))  # of the file
            resized = F.interpolate(of_sample[None], size, mode="bilinear", align_corners=False)
            sample.heatmap = resized[0, 0].cpu()


def _ask_for_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"output_attentions": True}


def _boxes(sample: DataSample) -> Tensor:
    boxes: Any = sample.get("gt_bboxes")
    if boxes is None:
        raise ValueError(
            "AMC needs each image's gt_bboxes; name them in algorithm_keys of PackInputs"
        )
    return torch.as_tensor(boxes).reshape(-1, 4)


@MODELS.register_module()
class AMCBlipRetrieval(_AMCMixin, BlipRetrieval):
    """``BlipRetrieval`` with AMC, the score is the logit that image and phrase match.

    In ``mode="predict"``, which retrieval itself does not use, it gives phrases' heatmaps.

    Args:
        *args: as of ``BlipRetrieval``.
        tokenizer: as there.
        attention_mask_consistency: arguments of :class:`plugin_core.AttentionMaskConsistency`; None
            for no such loss.
        heatmap_layer: of ``text_backbone``, from 0.
        **kwargs: as of ``BlipRetrieval``.

    Raises:
        ArgumentError: if there is no such layer, the text model is missing, or a setting is wrong.
    """

    def _text_encoder(self) -> Any:
        return self.text_backbone

    def _vision_encoder(self) -> Any:
        return self.vision_backbone

    def _scoring(self) -> nn.Module:
        head: nn.Module = self.multimodal_head
        return head

    def _scores(self, calls: Sequence[Call]) -> Tensor:
        scores: Tensor = calls[-1].output[:, 1]
        return scores

    def _words(self, data_samples: Sequence[DataSample]) -> Tensor:
        words: Tensor = self.preprocess_text(data_samples).attention_mask
        return words

    def loss(self, images: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        for sample in data_samples:  # grounding data do not say so
            sample.is_matched = True
        return super().loss(images, data_samples)

    def predict(
        self, images: Tensor, data_samples: list[DataSample], **kwargs: Any
    ) -> list[DataSample]:
        """Give each phrase's heatmap over its image."""
        with torch.enable_grad(), self._record() as calls:
            texts = self.preprocess_text(data_samples)
            texts.input_ids[:, 0] = self.tokenizer.additional_special_tokens_ids[0]
            patches = self.vision_backbone(images)[0]
            fused = self.text_backbone(
                texts.input_ids,
                attention_mask=texts.attention_mask,
                encoder_hidden_states=patches,
                encoder_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.long),
                return_dict=True,
            )
            self.multimodal_head((fused.last_hidden_state[:, 0],))
            self._predict_heatmaps(images, data_samples, calls)
        for sample in data_samples:
            if "gt_bboxes" in sample:  # in pixels of the file, as BlipGrounding gives them
                scale = torch.tensor(sample.get("scale_factor", (1, 1))).repeat(2)
                sample.gt_bboxes = _boxes(sample) / scale
        return data_samples


@MODELS.register_module()
class AMCBlipGrounding(_AMCMixin, BlipGrounding):
    """``BlipGrounding`` with AMC, the score is the log-likelihood of the box's tokens.

    Training takes the tokens of the annotated box, evaluation those that it predicts.

    Args:
        *args: as of ``BlipGrounding``.
        tokenizer: as there.
        attention_mask_consistency: arguments of :class:`plugin_core.AttentionMaskConsistency`; None
            for no such loss.
        heatmap_layer: of ``multimodal_encoder``, from 0.
        **kwargs: as of ``BlipGrounding``.

    Raises:
        ArgumentError: if there is no such layer, the text model is missing or has no tokens for
            boxes, or a setting is wrong.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        last = f"[unused{340 + self.grounding_head.image_res}]"
        if self.tokenizer.convert_tokens_to_ids(last) == self.tokenizer.unk_token_id:
            raise ArgumentError(
                "tokenizer.name_or_path",
                f"must be a text model with tokens for boxes, [unused339] to {last}, as "
                f"bert-base-uncased has them, got {self.tokenizer.name_or_path!r}",
            )

    def _text_encoder(self) -> Any:
        return self.multimodal_encoder

    def _vision_encoder(self) -> Any:
        return self.visual_encoder

    def _scoring(self) -> nn.Module:
        decoder: nn.Module = self.grounding_head.decoder
        return decoder

    def _scores(self, calls: Sequence[Call]) -> Tensor:
        (tokens,), logits = calls[-1].args, calls[-1].output.logits[:, :4]
        likelihood = (logits + self.grounding_head.bbox_prob_mask).log_softmax(2)
        # In training the box follows the first token; in evaluation its last token is to come.
        box = tokens[:, 1:] if tokens.shape[1] > 4 else likelihood.argmax(2)
        return likelihood.gather(2, box[:, :, None]).sum((1, 2))

    def _words(self, data_samples: Sequence[DataSample]) -> Tensor:
        texts = self.tokenizer(
            [sample.text for sample in data_samples],
            padding="longest",
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        words: Tensor = texts.attention_mask.to(next(self.parameters()).device)
        return words

    def loss(self, images: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        for sample in data_samples:  # BlipGrounding reads its box under another name than RefCOCO's
            sample.box = _boxes(sample)[0].cpu().numpy()
            sample.set_field(tuple(images.shape[2:]), "img_shape", field_type="metainfo")
        return super().loss(images, data_samples)

    def predict(self, images: Tensor, data_samples: list[DataSample]) -> list[DataSample]:
        """Give boxes, and each phrase's heatmap over its image."""
        with torch.enable_grad(), self._record() as calls:
            found: list[DataSample] = super().predict(images, data_samples)
            self._predict_heatmaps(images, found, calls)
        return found
