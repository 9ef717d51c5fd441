"""The base of detectors with losses that differentiate gradients: when they are taken, warnings."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub, print_log
from torch import Tensor

from mm_plugins.grounding.text_models import text_model_is_there
from mm_plugins.mixins import DetectorMixin
from plugin_core.errors import ArgumentError
from plugin_core.kernels import is_compiling


class AuxiliaryLossMixin(DetectorMixin):
    """The base of mixins that add a loss on gradients to a detector.

    Raises:
        ValueError: if the detector's text model is missing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        text_model = (kwargs.get("language_model") or {}).get("name")
        guard: Any = nullcontext()
        if text_model is not None:
            guard = text_model_is_there(text_model, "language_model.name")
        with guard:
            super().__init__(*args, **kwargs)
        self._steps = 0
        self._warned: set[str] = set()
        self._has_auxiliary_loss = False

    def _expect_auxiliary_loss(self) -> None:
        """Refuse activation checkpoints, which cannot be differentiated twice.

        Raises:
            ArgumentError: names the setting.
        """
        self._has_auxiliary_loss = True
        inner = getattr(getattr(self, "bbox_head", None), "head", None)
        for setting, module, attribute in (
            ("encoder.num_cp", getattr(self, "encoder", None), "num_cp"),
            ("bbox_head.use_checkpoint", inner, "use_checkpoint"),
        ):
            if getattr(module, attribute, 0) > 0:
                raise ArgumentError(
                    setting,
                    "must be 0 or False, as gradients are differentiated, which activation "
                    f"checkpoints do not allow, got {getattr(module, attribute)!r}",
                )

    def _is_due(self, every: int) -> bool:
        """Whether a loss of every so many steps is taken in this step."""
        if is_compiling():
            raise ValueError(
                f"{type(self).__name__}: a compiled training has no second derivatives; leave "
                "compile out of the config"
            )
        step: int = MessageHub.get_current_instance().get_info("iter", self._steps)
        return torch.is_grad_enabled() and step % every == 0

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Any]:
        if self._has_auxiliary_loss:
            self._steps += 1
            for sample in batch_data_samples:
                self._drop_boxes_without_text(sample)
        losses: dict[str, Any] = super().loss(batch_inputs, batch_data_samples)
        return losses

    def _drop_boxes_without_text(self, sample: DetDataSample) -> None:
        """Leave out boxes whose phrase is no part of the text: tokenizing it would fail."""
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

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            print_log(f"{text} (further such images are not named)", "current", 30)
