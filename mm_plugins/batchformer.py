"""BatchFormerV2 (arXiv:2204.01254) in the encoder of a DETR, of MMDetection's or of one's own.

In a config::

    custom_imports = dict(imports=['mm_plugins'])
    model = dict(type='PluginDeformableDETR', batchformer=dict(insert_after=(0,)))

In training the batch of B images is two streams after the first insertion: the untouched images
first, and after them their versions in which the images of the batch have seen each other. The
encoder's further layers, the decoder and the head see 2B images, and each target twice. In
evaluation the detector is the plain one.

A step doubles once, where ``DetectionTransformer.forward_transformer`` can be opened::

    loss             hands on the samples as a list of its own kind, Streams
    pre_transformer  has seen B images; repeats the decoder's inputs and the list of samples
    forward_encoder  runs the layers up to the first insertion on B images, the others on 2B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.layers import DetrTransformerEncoder
from torch import Tensor, nn

from mm_plugins.mixins import DetectorMixin, not_for
from mm_plugins.settings import build_from
from plugin_core import BatchFormer
from plugin_core.errors import ArgumentError, check_bool
from plugin_core.stand_ins import view

# Inputs of encoders and decoders whose first dimension is not the batch
_WITHOUT_BATCH = frozenset({"spatial_shapes", "level_start_index"})
# The encoder's input that says that a batch is doubled: (H, W) of the last feature map
MAP_SIZE = "map_size"


class Streams(list):
    """The samples of a training step: B of them, and 2B from ``pre_transformer`` on."""


class BatchFormerMixin(DetectorMixin):
    """Puts BatchFormerV2 into a DETR: ``class MyDETR2(BatchFormerMixin, MyDETR)``.

    Parameters of the detector keep their names; BatchFormer's are ``encoder.batchformer.…``. Losses
    are means over both streams, as heads divide by the number of targets. DDQ's auxiliary losses
    are not: it divides them by their targets' weights, or by 1 where those are less. Nor are
    Mask2Former's exactly, as it draws the points of its losses for each stream.

    Args:
        batchformer: arguments of :class:`BatchFormers`; None for the plain detector.

    Raises:
        ArgumentError: if the detector has no encoder of MMDetection's, or an argument is wrong.
        ValueError: in training, if the detector's ``loss`` does not hand on its list of samples.
    """

    place = 2

    def __init__(self, *args: Any, batchformer: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if batchformer is None:
            return
        encoder = self._detr_encoder()
        if not isinstance(encoder, DetrTransformerEncoder):
            raise not_for(self, "batchformer")
        is_trained = any(parameter.requires_grad for parameter in encoder.parameters())
        encoder.batchformer = build_from(
            "batchformer",
            BatchFormers,
            batchformer,
            embed_dims=encoder.embed_dims,
            depth=len(encoder.layers),
        ).requires_grad_(is_trained)

    def _detr_encoder(self) -> Any:
        return getattr(self, "encoder", None)

    @property
    def batchformers(self) -> BatchFormers | None:
        """The BatchFormers of the encoder; None of the plain detector."""
        return getattr(self._detr_encoder(), "batchformer", None)

    def _is_doubled(self) -> bool:
        return self.training and self.batchformers is not None

    def _is_related(self) -> bool:
        """Whether images see each other without another stream: the authors' batch inference."""
        modules = self.batchformers
        return modules is not None and modules.in_evaluation and not self.training

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict | list:
        if not self._is_doubled():
            return super().loss(batch_inputs, batch_data_samples)
        streams = Streams(batch_data_samples)
        losses: dict | list = super().loss(batch_inputs, streams)
        if len(streams) != 2 * len(batch_data_samples):
            raise ValueError(
                f"batchformer: {type(self).__name__}.loss must hand on the list of samples that it "
                "is given, to forward_transformer and to the head, which get each sample twice; "
                "it has made a list of its own"
            )
        return losses

    def pre_transformer(
        self, img_feats: Sequence[Tensor], batch_data_samples: Any = None
    ) -> tuple[dict, dict]:
        encoder_inputs, decoder_inputs = super().pre_transformer(img_feats, batch_data_samples)
        if isinstance(batch_data_samples, Streams):
            # In place: the caller passes the same list on to pre_decoder and to the head.
            batch_data_samples.extend(list(batch_data_samples))
            decoder_inputs = repeat(decoder_inputs)
            encoder_inputs[MAP_SIZE] = tuple(img_feats[-1].shape[-2:])
        return encoder_inputs, decoder_inputs

    def forward_encoder(self, **inputs: Any) -> dict[str, Any]:
        map_size = inputs.pop(MAP_SIZE, None)
        if map_size is None and not self._is_related():
            return super().forward_encoder(**inputs)
        encoder = TwoStreamEncoder(self.encoder, map_size)
        if map_size is not None:
            inputs = repeat(inputs)
        return super(BatchFormerMixin, view(self, encoder=encoder)).forward_encoder(**inputs)


class PixelDecoderBatchFormerMixin(BatchFormerMixin):
    """Puts BatchFormerV2 into the encoder of a MaskFormer's or Mask2Former's pixel decoder.

    These cannot be opened around the encoder: images are repeated after the backbone.

    Args:
        batchformer: as of :class:`BatchFormerMixin`.
    """

    def _detr_encoder(self) -> Any:
        return getattr(self.panoptic_head.pixel_decoder, "encoder", None)

    def _with_batchformers(self, map_size: tuple[int, int] | None = None) -> Any:
        pixel_decoder = self.panoptic_head.pixel_decoder
        encoder = TwoStreamEncoder(pixel_decoder.encoder, map_size)
        head = view(self.panoptic_head, pixel_decoder=view(pixel_decoder, encoder=encoder))
        return view(self, panoptic_head=head)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict | list:
        if not self._is_doubled():
            return super().loss(batch_inputs, batch_data_samples)
        features = self.extract_feat(batch_inputs)
        detector = self._with_batchformers(tuple(features[-1].shape[-2:]))
        doubled, count = repeat(features), len(batch_data_samples)
        if any(len(level) != 2 * count for level in doubled):
            raise ValueError(
                f"batchformer: the backbone must give feature maps of {count} images, got those of "
                f"{[len(level) for level in features]}"
            )
        return detector.panoptic_head.loss(doubled, list(batch_data_samples) * 2)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        detector: Any = self._with_batchformers() if self._is_related() else self
        return super(PixelDecoderBatchFormerMixin, detector).predict(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        detector: Any = self._with_batchformers() if self._is_related() else self
        return super(PixelDecoderBatchFormerMixin, detector)._forward(*args, **kwargs)


class BatchFormers(nn.ModuleDict):
    """The BatchFormers of an encoder, each under the index of the layer that it comes after.

    A shared one stands under the first index.

    Args:
        embed_dims: channels C of the encoder.
        depth: number of the encoder's layers.
        insert_after: indices of layers, counted from 0; the first, in the paper.
        share: the same weights at all insertions.
        num_layers: of each BatchFormer, at least 1.
        num_heads: by which C can be divided.
        feedforward_channels: None for C.
        dropout: rate in [0, 1).
        mask_padding: padded positions of an image are not seen by the other images. The authors
            let them be seen.
        gather: the images of a distributed training's other processes are seen, too, each position
            at the same place of their feature maps.
        eval: in evaluation the batch goes through the BatchFormers, so that results depend on
            which images are evaluated together: the authors' batch inference.

    Raises:
        ArgumentError: if ``insert_after`` names no layer of the encoder, or an argument's value is
            wrong.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        insert_after: Sequence[int] = (0,),
        share: bool = False,
        num_layers: int = 1,
        num_heads: int = 4,
        feedforward_channels: int | None = None,
        dropout: float = 0.5,
        mask_padding: bool = False,
        gather: bool = False,
        eval: bool = False,
    ) -> None:
        indices = _check_insertions(insert_after, depth)
        check_bool(share=share, mask_padding=mask_padding, eval=eval)
        super().__init__(
            {
                str(index): BatchFormer(
                    embed_dims, num_heads, feedforward_channels, dropout, num_layers, gather
                )
                for index in (indices[:1] if share else indices)
            }
        )
        self.insert_after = indices
        self.share = share
        self.mask_padding = mask_padding
        self.gather = gather
        self.in_evaluation = eval

    def after(self, index: int) -> nn.Module:
        """The BatchFormer after the encoder's layer of this index."""
        return self[str(self.insert_after[0] if self.share else index)]

    def extra_repr(self) -> str:
        return (
            f"share={self.share}, mask_padding={self.mask_padding}, "
            f"in_evaluation={self.in_evaluation}"
        )


class TwoStreamEncoder(nn.Module):
    """Stands in for an encoder in a step: runs its layers, with its BatchFormers between them.

    Args:
        encoder: of MMDetection's, with :class:`BatchFormers` as its child ``batchformer``.
        map_size: (H, W) of the feature map, where the encoder is given no ``spatial_shapes``. None
            where the batch is not doubled: every image goes through the BatchFormers.
    """

    def __init__(self, encoder: nn.Module, map_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.map_size = map_size

    def forward(self, **inputs: Any) -> Any:
        """What the encoder gives, of its inputs by name; of a doubled batch each image twice."""
        streams, doubled = self.encoder.batchformer, self.map_size is not None
        once = first_half(inputs) if doubled else inputs
        batch = len(once["query"])
        padding = once["key_padding_mask"] if streams.mask_padding else None
        shapes = self._shapes(inputs) if streams.gather and doubled else None
        now, start = once, 0
        for index in streams.insert_after:
            outputs = self._part(start, index + 1)(**now)
            x, *text = outputs if isinstance(outputs, tuple) else (outputs,)
            related = streams.after(index)(x[-batch:], padding, shapes)
            now = {**inputs, "query": torch.cat([x[:batch], related]) if doubled else related}
            if text:
                now["memory_text"] = repeat(text[0]) if doubled and start == 0 else text[0]
            start = index + 1
        return self._part(start, len(self.encoder.layers))(**now)

    def _part(self, start: int, stop: int) -> nn.Module:
        """The encoder with some of its layers only."""
        # Grounding DINO has lists of layers for text and for fusion, too.
        lists = {
            name: child[start:stop]
            for name, child in self.encoder.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == len(self.encoder.layers)
        }
        part: nn.Module = view(self.encoder, **lists)
        return part

    def _shapes(self, inputs: dict[str, Any]) -> list[Any]:
        shapes = inputs.get("spatial_shapes")
        return [self.map_size] if shapes is None else [tuple(hw) for hw in shapes.tolist()]


def repeat(batch: Any) -> Any:
    """Give a batch twice; also each of a tuple, list or dict of batches. Numbers stay."""
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch])
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(repeat, batch))
    if isinstance(batch, dict):
        return {key: x if key in _WITHOUT_BATCH else repeat(x) for key, x in batch.items()}
    if batch is None or isinstance(batch, (bool, int, float)):
        return batch
    raise TypeError(f"batchformer: a batch must be of tensors, got a {type(batch).__name__}")


def first_half(inputs: dict[str, Any]) -> dict[str, Any]:
    """Each image once, of inputs that hold each twice."""
    return {
        name: x[: len(x) // 2] if isinstance(x, Tensor) and name not in _WITHOUT_BATCH else x
        for name, x in inputs.items()
    }


def _check_insertions(insert_after: Any, depth: int) -> list[int]:
    name = "insert_after"
    if not isinstance(insert_after, Sequence) or isinstance(insert_after, str) or not insert_after:
        raise ArgumentError(
            name, f"must be a tuple of encoder layers such as (0,), got {insert_after!r}"
        )
    for index in insert_after:
        if type(index) is not int or not 0 <= index < depth:
            raise ArgumentError(
                name, f"names layer {index!r}; the encoder has layers 0 to {depth - 1}"
            )
    if len(set(insert_after)) < len(insert_after):
        raise ArgumentError(name, f"names a layer twice: {insert_after!r}")
    return sorted(insert_after)
