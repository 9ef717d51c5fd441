"""The image features and text embeddings of grounding detectors, and the logits made of both.

What the detectors' heads give for queries cannot be compared between noisy copies of an image, as
queries are sorted by score. The logits of all positions can: of Grounding DINO's encoder, by which
its queries are chosen, and of GLIP's anchors. Each is a decision of its own, so that targets are
sigmoids and not the softmax of the paper's answers, and the loss is the sum over them. The numbers
of two detectors therefore do not compare, nor do weights. Of GLIP, images that were padded to the
size of their batch are perturbed there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugin_core import FunctionalEntropyRegularizer


class _Modalities:
    """Records what a module is called with, and calls it again with noisy copies."""

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.inputs: dict[str, Any] = {}
        self.outputs: Any = None

    def _module(self) -> nn.Module:
        raise NotImplementedError

    def _note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    @contextmanager
    def record(self) -> Iterator[Any]:
        """Record a forward pass."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs = self._note_inputs(args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs = output

        handles = [
            self._module().register_forward_pre_hook(before, with_kwargs=True),
            self._module().register_forward_hook(after),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def regularize(self, entropy: FunctionalEntropyRegularizer) -> tuple[Tensor, dict[str, Tensor]]:
        """The term of a recorded forward pass, and the information of image and text."""
        raise NotImplementedError


class GroundingDINOModalities(_Modalities):
    """What Grounding DINO's encoder fuses: feature maps in a row, and the text's embeddings."""

    def _module(self) -> nn.Module:
        return self.detector.encoder

    def _note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(kwargs)

    def regularize(self, entropy: FunctionalEntropyRegularizer) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.inputs
        image, text, padding = (inputs[k] for k in ("query", "memory_text", "key_padding_mask"))
        words = ~inputs["text_attention_mask"]

        def logits(memory: Tensor, memory_text: Tensor) -> Tensor:
            proposals, _ = self.detector.gen_encoder_output_proposals(
                memory, padding, inputs["spatial_shapes"]
            )
            scores = self.detector.bbox_head.cls_branches[self.detector.decoder.num_layers]
            found: Tensor = scores(proposals, memory_text, words)[..., : words.shape[1]]
            return found.masked_fill(~words[:, None], 0.0)  # instead of -inf

        def run(noisy: dict[str, Any]) -> Tensor:
            return logits(
                *self.detector.encoder(
                    **{**inputs, "query": noisy["image"], "memory_text": noisy["text"]}
                )
            )

        visible = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        if padding is not None:
            visible = ~padding
        with torch.no_grad():
            clean = logits(self.outputs[0], self.outputs[1])
        return entropy(
            _copy_by_copy(run, entropy.samples),
            {"image": image, "text": text},
            clean,
            masks={"image": visible, "text": words},
            valid=visible[:, :, None] & words[:, None],
        )


class GLIPModalities(_Modalities):
    """What GLIP's head fuses: the levels of the feature pyramid, and the text's hidden states."""

    def _module(self) -> nn.Module:
        return self.detector.bbox_head

    def _note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        features, text = args
        return {"features": tuple(features), "text": dict(text)}  # which the head overwrites

    def regularize(self, entropy: FunctionalEntropyRegularizer) -> tuple[Tensor, dict[str, Tensor]]:
        features, text = self.inputs["features"], self.inputs["text"]
        head = self.detector.bbox_head
        read = "hidden" if head.head.early_fuse else "embedded"
        words = text["masks"] > 0

        def run(noisy: dict[str, Any]) -> Tensor:
            logits, _, _ = head(noisy["image"], text | {read: noisy["text"]})
            return torch.cat(logits, dim=1)

        return entropy(
            _copy_by_copy(run, entropy.samples),
            {"image": features, "text": text[read]},
            torch.cat(self.outputs[0], dim=1),
            masks={"text": words},
            valid=words[:, None],
        )


def _copy_by_copy(
    run: Callable[[dict[str, Any]], Tensor], samples: int
) -> Callable[[dict[str, Any]], Tensor]:
    """Run one noisy copy of the batch after the other, in the company that its images came in.

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
