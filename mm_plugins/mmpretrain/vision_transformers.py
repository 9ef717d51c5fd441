"""BatchFormerV2 (arXiv:2204.01254) in MMPretrain's vision transformers, DeiT among them.

In a config::

    custom_imports = dict(imports=["mm_plugins"])
    model = dict(type="BatchFormerImageClassifier", batchformer=dict(insert_after=(8,)))

In training the batch of B images is two streams after the first insertion: the untouched images
first, and after them their versions in which the images of the batch have seen each other. The
further layers and the head see 2B images, and each label twice, also mixup's. In evaluation the
classifier is the plain one.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from mmpretrain.models.backbones import BEiTViT, VisionTransformer
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mm_plugins.batchformer import BatchFormers
from mm_plugins.mmpretrain.training_batchformers import TrainingBatchFormers
from mm_plugins.settings import build_from
from plugin_core.errors import ArgumentError
from plugin_core.stand_ins import view


@MODELS.register_module()
class BatchFormerImageClassifier(ImageClassifier):
    """``ImageClassifier`` whose vision transformer has BatchFormerV2 between its layers.

    Parameters of the classifier keep their names; BatchFormer's are ``backbone.batchformer.…``. The
    loss is the mean over both streams. It also loads the files of DeiT's and BatchFormerV2's
    authors, whose names are timm's.

    Args:
        batchformer: arguments of :class:`mm_plugins.batchformer.BatchFormers`, except
            ``mask_padding``, as images have one size; None for the plain classifier.
        *args: of ``ImageClassifier``.
        **kwargs: likewise. The backbone must be a ``VisionTransformer``, as DeiT, DeiT3 and EVA-02
            are, or a ``BEiTViT``.

    Raises:
        ArgumentError: if the backbone is another, or an argument is wrong.
    """

    def __init__(
        self, *args: Any, batchformer: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(_read_timm_names, with_module=True)
        if batchformer is None:
            return
        if not isinstance(self.backbone, (VisionTransformer, BEiTViT)):  # others' layers differ
            raise ArgumentError(
                "batchformer",
                "must be left out, or the backbone be a VisionTransformer (as DeiT, DeiT3 and "
                f"EVA-02 are) or a BEiTViT, got {type(self.backbone).__name__}",
            )
        self.backbone.batchformer = build_from(
            "batchformer",
            TrainingBatchFormers,
            batchformer,
            embed_dims=self.backbone.embed_dims,
            depth=len(self.backbone.layers),
            mask_padding=False,
        )

    @property
    def batchformers(self) -> BatchFormers | None:
        """The BatchFormers of the backbone; None of the plain classifier."""
        return getattr(self.backbone, "batchformer", None)

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Compute the loss of both streams in training, from the images and labels of one."""
        losses: dict[str, Tensor]
        if not self.training or self.batchformers is None:
            losses = super().loss(inputs, data_samples)
            return losses
        doubled = view(self, backbone=_with_batchformers(self.backbone, doubled=True))
        losses = super(BatchFormerImageClassifier, doubled).loss(
            inputs, [*data_samples, *data_samples]
        )
        return losses

    def predict(self, inputs: Tensor, *args: Any, **kwargs: Any) -> list[DataSample]:
        classifier: Any = self
        if self.batchformers is not None and self.batchformers.in_evaluation:
            classifier = view(self, backbone=_with_batchformers(self.backbone, doubled=False))
        found: list[DataSample] = super(BatchFormerImageClassifier, classifier).predict(
            inputs, *args, **kwargs
        )
        return found


def _with_batchformers(backbone: Any, doubled: bool) -> Any:
    """The backbone with its BatchFormers between its layers."""
    modules, layers = backbone.batchformer, list(backbone.layers)
    for i in modules.insert_after:
        streams = 1 + (doubled and i > modules.insert_after[0])
        layers[i] = _LayerAndBatchFormer(layers[i], modules.after(i), streams, doubled)
    return view(backbone, layers=nn.ModuleList(layers))


class _LayerAndBatchFormer(nn.Module):
    """Stands in for a layer in a step.

    Args:
        layer: that it runs first.
        batchformer: over the layer's last stream.
        streams: number of streams before it.
        doubled: keep the first stream beside what the BatchFormer gives.
    """

    def __init__(
        self, layer: nn.Module, batchformer: nn.Module, streams: int, doubled: bool
    ) -> None:
        super().__init__()
        self.layer, self.batchformer = layer, batchformer
        self.streams, self.doubled = streams, doubled

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.layer(x, *args, **kwargs)
        batch = len(x) // self.streams
        related = self.batchformer(x[-batch:])
        return torch.cat([x[:batch], related]) if self.doubled else related


_TIMM_NAMES = {
    r"(cls_token|dist_token|pos_embed)$": r"backbone.\1",
    r"patch_embed\.proj\.": "backbone.patch_embed.projection.",
    r"norm\.": "backbone.ln1.",
    r"(head|head_dist)\.": r"head.layers.\1.",
    r"(blocks\.\d+\.)block\.": r"\1",  # of the authors' mixed precision
    r"(blocks\.\d+\.)norm": r"\1ln",
    r"(blocks\.\d+\.)mlp\.fc1\.": r"\1ffn.layers.0.0.",
    r"(blocks\.\d+\.)mlp\.fc2\.": r"\1ffn.layers.1.",
}
_INSERTED = re.compile(r"blocks\.(\d+)\.encoder_layers\.")


def _read_timm_names(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of a vision transformer of timm's, in place.

    The authors of BatchFormerV2 put it between timm's blocks, where it is counted as a block. One
    that is shared is in their files at each of its places.
    """
    if f"{prefix}patch_embed.proj.weight" not in state_dict:
        return
    names = {key: key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    inserted = [match[1] for name in names.values() if (match := _INSERTED.match(name))]
    places = sorted({int(place) for place in inserted})
    shares = module.batchformers is not None and module.batchformers.share
    for key, name in names.items():
        tensor = state_dict.pop(key)
        for theirs, ours in _TIMM_NAMES.items():
            name = re.sub(f"^{theirs}", ours, name)
        if name.startswith("blocks."):
            number, own = name.removeprefix("blocks.").split(".", 1)
            place = int(number)
            layer = place - sum(other < place for other in places)
            if place not in places:
                name = f"backbone.layers.{layer}.{own}"
            elif not shares or place == places[0]:
                own = own.removeprefix("encoder_layers.")
                name = f"backbone.batchformer.{layer - 1}.{own}"
            else:
                continue
        state_dict[f"{prefix}{name}"] = tensor
