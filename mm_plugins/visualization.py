"""Running a trained detector of MMDetection on an image, for a look at its attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mmcv
import torch
from mmcv.transforms import Compose
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.models.utils import select_single_mlvl
from mmdet.registry import DATASETS, MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import get_test_pipeline_cfg, register_all_modules
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mm_plugins.analysis import load_config
from mm_plugins.scripts import has_cuda_operators
from plugin_core.attention_maps import Call, Detections, Detector, Picture, load_weights


class MMDetDetector(Detector):
    """A detector of MMDetection.

    Args:
        config_file: as :func:`mm_plugins.analysis.load_config` takes it.
        weights: path of the checkpoint of the whole detector.
        trust: whether what the checkpoint asks to run may be run.

    Raises:
        ValueError: if the config is wrong, or the weights are missing or do not fit it.
    """

    def __init__(self, config_file: str, weights: str, *, trust: bool = False) -> None:
        cfg = load_config(config_file)
        register_all_modules(init_default_scope=False)
        self._scope = cfg.get("default_scope") or "mmdet"
        with DefaultScope.overwrite_default_scope(self._scope):
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
            self._transform = Compose(get_test_pipeline_cfg(cfg))
        content = load_weights(model, weights, trust=trust)
        on_gpu = torch.cuda.is_available() and has_cuda_operators()
        self.model: nn.Module = model.to("cuda" if on_gpu else "cpu").eval().requires_grad_(False)
        head: Any = getattr(model, "roi_head", model).bbox_head
        if isinstance(head, nn.ModuleList):  # of the stages of a cascade
            head = head[-1]
        names = _class_names(cfg, content)
        # Of another dataset than the model's, they would be wrong.
        fits = len(names) == head.num_classes
        self.class_names = names if fits else tuple(map(str, range(head.num_classes)))

    def read(self, path: str) -> Picture:
        try:
            image = mmcv.imread(path, channel_order="rgb")
        except OSError as error:
            raise ValueError(f"image {path!r} cannot be read: {error}") from error
        if image is None:
            raise ValueError(f"image {path!r} cannot be read: it is no image, or is cut off")
        with DefaultScope.overwrite_default_scope(self._scope):
            data = self._transform({"img_path": path, "img_id": 0})
        sample = data["data_samples"]
        # The input may be larger: a pipeline can pad.
        scale_x, scale_y = sample.get("scale_factor", (1.0, 1.0))
        input_size = (round(image.shape[0] * scale_y), round(image.shape[1] * scale_x))
        return Picture(image, data["inputs"].float()[None], input_size, sample)

    def detect(self, picture: Picture, pixels: Tensor) -> Detections:
        model: Any = self.model
        data = {"inputs": [pixels[0]], "data_samples": [copy.deepcopy(picture.meta)]}
        with DefaultScope.overwrite_default_scope(self._scope), _differentiable(model):
            (sample,) = model.test_step(data)
        found = sample.pred_instances
        return Detections(get_box_tensor(found.bboxes).detach(), found.scores, found.labels)

    def last_stage(self) -> str:
        backbone: Any = self.model.get_submodule("backbone")
        for attribute in ("res_layers", "layers"):  # ResNet, MobileNetV2
            stages = getattr(backbone, attribute, None)
            if isinstance(stages, list):
                return f"backbone.{stages[max(backbone.out_indices)]}"
        raise ValueError(
            f"backbone is a {type(backbone).__name__}, which has no stages as a ResNet has"
        )

    def region_extractors(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, BaseRoIExtractor)]

    def regions(self, call: Call) -> Tensor:
        return call.args[1][:, 1:]  # the first number is the image's in the batch


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Let gradients through a one-stage head, which cuts them off before it selects detections."""

    def select(tensors: Sequence[Tensor], image: int, detach: bool = True) -> list[Tensor]:
        return select_single_mlvl(tensors, image, detach=False)

    head = getattr(model, "bbox_head", None)
    # The head has no method or argument for it, so its module's function is exchanged meanwhile.
    names = head.predict_by_feat.__func__.__globals__ if isinstance(head, BaseDenseHead) else {}
    with patch.dict(names, {"select_single_mlvl": select}):
        yield


def _class_names(cfg: Config, checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that the training has left in the checkpoint, or else those of the test dataset."""
    meta = checkpoint.get("meta") or {}
    dataset = cfg.test_dataloader.dataset
    while "type" in dataset and "metainfo" not in dataset and "dataset" in dataset:
        dataset = dataset.dataset
    kind = DATASETS.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
    for metainfo in (
        meta.get("dataset_meta"),
        dataset.get("metainfo"),
        getattr(kind, "METAINFO", None),
    ):
        names = {key.lower(): value for key, value in (metainfo or {}).items()}.get("classes")
        if names:
            return tuple(names)
    return ()
