"""BatchFormerV2 (arXiv:2204.01254) in the encoder of any DETR, and where else such an encoder is.

In a config, on any of MMDetection's own::

    custom_imports = dict(imports=['mm_plugins'])
    model = dict(type='BatchFormerDetector', detector='DeformableDETR',
                 batchformer=dict(insert_after=(0,)))

In training the batch of B images is two streams after the first insertion: the untouched images,
and behind them their versions in which the images of the batch have seen each other. All that
follows, the encoder's further layers, decoder and heads, serves both, and the targets are repeated.

The framework's own code does so because it is given 2 B images, each twice, from the start. What
comes before the first insertion is wrapped by hooks that run it once, on the first B, and repeat
what it gives. So neither an encoder nor a detector is written anew here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.models.layers import DetrTransformerEncoder
from mmdet.registry import MODELS
from torch import Tensor, nn

from mm_plugins.overlay import Overlay, detector_class, lay_over
from plugin_core import BatchFormer

# What an encoder passes to its layers that has another first dimension than the batch
_WITHOUT_BATCH = frozenset({"spatial_shapes", "level_start_index"})


@MODELS.register_module(name="BatchFormerDetector")
def build_batchformer_detector(
    detector: str | type[BaseDetector],
    batchformer: dict[str, Any] | None = None,
    **kwargs: Any,
) -> BaseDetector:
    """A detector with BatchFormerV2 in its encoder; parameters of its own keep their names.

    Losses are means over both streams, as the authors normalize them, since a head divides by the
    number of targets, which are repeated: their values compare with the plain detector's. In
    evaluation it is the plain detector.

    Args:
        detector: the type of the detector, as it stands in the config without BatchFormerV2.
        batchformer: arguments of :func:`insert_batchformer` but for the encoder.
        **kwargs: of the detector.

    Raises:
        ValueError: if there is no such detector, it has no encoder, or an argument of
            ``batchformer`` is wrong.
    """
    made = lay_over(detector_class(detector), _BatchFormerDetector)
    return made(batchformer=batchformer or {}, **kwargs)


class TwoStreams(nn.ModuleDict):
    """The BatchFormers of an encoder, each under the index of the layer that it comes after.

    A shared one stands under the first index. :func:`insert_batchformer` makes it a part of an
    encoder.

    Args:
        embed_dims: channels C of the encoder.
        insert_after: indices of layers, counted from 0, ascending.
        share: the same weights at all insertions.
        mask_padding: padded positions of an image are not seen by the other images.
        eval: the BatchFormers work in evaluation, too.
        **batchformer: other arguments of each :class:`plugin_core.BatchFormer`.

    Raises:
        ValueError: if BatchFormer does not take an argument's value.
    """

    def __init__(
        self,
        embed_dims: int,
        insert_after: Sequence[int],
        share: bool,
        mask_padding: bool,
        eval: bool,
        **batchformer: Any,
    ) -> None:
        super().__init__(
            {
                str(index): BatchFormer(embed_dims, **batchformer)
                for index in (insert_after[:1] if share else insert_after)
            }
        )
        self.share = share
        self.mask_padding = mask_padding
        self.in_evaluation = eval
        self.first = insert_after[0]
        # Whether batches hold every image twice. It stays so after a training's forward, as a
        # checkpointed encoder runs again in the backward.
        self.is_doubled = False
        # (H, W) of the feature map, where the encoder does not tell its layers
        self.map_size: tuple[int, int] | None = None

    def run_once(self, module: nn.Module, repeat: bool = True) -> None:
        """Let a module see each image of a doubled batch once.

        Args:
            module: takes and gives tensors or lists whose first dimension is the batch.
            repeat: give what it returns twice, as its input was.
        """
        module.register_forward_pre_hook(self._halve_inputs, with_kwargs=True)
        if repeat:
            module.register_forward_hook(self._repeat_output)

    def insert_after(self, index: int, layer: nn.Module) -> None:
        """Let what an encoder's layer gives go through the BatchFormer of its index."""
        hook = functools.partial(self._insert, index)
        layer.register_forward_hook(hook, with_kwargs=True)

    def _halve_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.is_doubled:
            return None
        halved = {k: v if k in _WITHOUT_BATCH else first_half(v) for k, v in kwargs.items()}
        return tuple(first_half(arg) for arg in args), halved

    def _repeat_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return repeat(output) if self.is_doubled else output

    def _insert(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> Tensor:
        if not (self.is_doubled or (self.in_evaluation and not self.training)):
            return x
        padding = None
        if self.mask_padding:
            # Encoders pass it by its name, or as the third argument.
            padding = args[2] if len(args) > 2 else kwargs["key_padding_mask"]
        module = self[str(self.first if self.share else index)]
        shapes = None
        if module.gather and self.training:
            known = kwargs.get("spatial_shapes")
            shapes = [self.map_size] if known is None else [tuple(hw) for hw in known.tolist()]
        if not self.is_doubled:
            return module(x, padding)
        if index == self.first:
            return torch.cat([x, module(x, padding, shapes)])
        untouched, related = x.chunk(2)
        return torch.cat([untouched, module(related, first_half(padding), shapes)])

    def extra_repr(self) -> str:
        return (
            f"share={self.share}, mask_padding={self.mask_padding}, "
            f"in_evaluation={self.in_evaluation}"
        )


def insert_batchformer(
    encoder: DetrTransformerEncoder,
    insert_after: Sequence[int] = (0,),
    share: bool = False,
    num_layers: int = 1,
    num_heads: int = 4,
    feedforward_channels: int | None = None,
    dropout: float = 0.5,
    mask_padding: bool = False,
    gather: bool = False,
    eval: bool = False,
) -> TwoStreams:
    """Put BatchFormers into an encoder of MMDetection's, as its submodule ``batchformer``.

    Args:
        encoder: with ``layers`` and ``embed_dims``.
        insert_after: indices of layers, counted from 0; the first, in the paper.
        share: the same weights at all insertions.
        num_layers: of each BatchFormer.
        num_heads: by which the encoder's channels can be divided.
        feedforward_channels: None for as many as the encoder has.
        dropout: rate in [0, 1).
        mask_padding: padded positions of an image are not seen by the other images. The authors
            let them be seen.
        gather: the images of a distributed training's other processes are seen, too, each position
            at the same place of their feature maps.
        eval: in evaluation the batch goes through the BatchFormers, so that results depend on
            which images are evaluated together: the authors' batch inference.

    Raises:
        ValueError: if ``insert_after`` names no layer of the encoder, or BatchFormer does not take
            an argument's value.
    """
    indices = _check_insertions(insert_after, len(encoder.layers))
    try:
        streams = TwoStreams(
            encoder.embed_dims,
            indices,
            share,
            mask_padding,
            eval,
            num_layers=num_layers,
            num_heads=num_heads,
            feedforward_channels=feedforward_channels,
            dropout=dropout,
            gather=gather,
        )
    except ValueError as error:
        raise ValueError(f"batchformer: {error}") from error
    for layer_list in encoder.children():
        if isinstance(layer_list, nn.ModuleList) and len(layer_list) == len(encoder.layers):
            # Grounding DINO has lists of layers for text and for fusion, too.
            for i, layer in enumerate(layer_list[: streams.first + 1]):
                is_insertion = layer_list is encoder.layers and i == streams.first
                streams.run_once(layer, repeat=not is_insertion)
    for i in indices:
        streams.insert_after(i, encoder.layers[i])
    encoder.batchformer = streams
    return streams


class _BatchFormerDetector(Overlay):
    prefix = "BatchFormer"

    def __init__(self, *args: Any, batchformer: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        encoders = [n for n, m in self.named_modules() if isinstance(m, DetrTransformerEncoder)]
        if len(encoders) != 1:
            raise ValueError(
                f"detector: {type(self).__bases__[1].__name__} has {len(encoders)} DETR encoders "
                "where BatchFormerV2 needs one; take a DETR, MaskFormer or Mask2Former with one"
            )
        streams = insert_batchformer(self.get_submodule(encoders[0]), **batchformer)
        self._streams_name = f"{encoders[0]}.batchformer"
        self._holds_images_twice = False
        for module in _before_the_encoder(self):
            streams.run_once(module)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict | list:
        self._streams.is_doubled = self.training
        if not self.training:
            return super().loss(batch_inputs, batch_data_samples)
        self._holds_images_twice = True
        try:
            return super().loss(repeat(batch_inputs), repeat(list(batch_data_samples)))
        finally:
            self._holds_images_twice = False

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._streams.is_doubled = False
        return super().predict(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._streams.is_doubled = False
        return super()._forward(*args, **kwargs)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        if not self._holds_images_twice:
            return super().extract_feat(batch_inputs)
        features = super().extract_feat(first_half(batch_inputs))
        self._streams.map_size = tuple(features[-1].shape[-2:])
        return repeat(features)

    @property
    def _streams(self) -> TwoStreams:
        return self.get_submodule(self._streams_name)


def _before_the_encoder(detector: BaseDetector) -> Iterator[nn.Module]:
    """What else sees images or texts, and gives the same for both streams."""
    if hasattr(detector, "language_model"):
        yield detector.language_model
    if hasattr(detector, "panoptic_head"):
        pixel_decoder = detector.panoptic_head.pixel_decoder
        for name in ("input_convs", "lateral_convs"):
            yield from getattr(pixel_decoder, name, ())
        if hasattr(pixel_decoder, "encoder_in_proj"):
            yield pixel_decoder.encoder_in_proj


def first_half(batch: Any) -> Any:
    """Each image once, of a batch that holds each twice; what is no batch stays as it is."""
    return batch[: len(batch) // 2] if isinstance(batch, (Tensor, list)) else batch


def repeat(batch: Any) -> Any:
    """Give the batch twice; also each of a tuple or dict of batches."""
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch])
    if isinstance(batch, tuple):
        return tuple(repeat(part) for part in batch)
    if isinstance(batch, dict):
        return {key: repeat(value) for key, value in batch.items()}
    return batch * 2 if isinstance(batch, list) else batch


def _check_insertions(insert_after: Any, num_layers: int) -> list[int]:
    if not isinstance(insert_after, Sequence) or isinstance(insert_after, str) or not insert_after:
        raise ValueError(
            f"batchformer.insert_after: expected a tuple of encoder layers such as (0,), "
            f"got {insert_after!r}"
        )
    for index in insert_after:
        if type(index) is not int or not 0 <= index < num_layers:
            raise ValueError(
                f"batchformer.insert_after: there is no layer {index!r}; the encoder has layers "
                f"0 to {num_layers - 1}"
            )
    if len(set(insert_after)) < len(insert_after):
        raise ValueError(f"batchformer.insert_after: a layer is named twice in {insert_after!r}")
    return sorted(insert_after)
