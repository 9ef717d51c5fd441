"""Trained detectors of Detectron2, run on an image to look at their attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation, read_image
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from omegaconf import OmegaConf
from torch import Tensor, nn

from d2_plugins.analysis import load_config
from d2_plugins.backbones import last_stage
from d2_plugins.mmdet_bridge import is_bridge
from d2_plugins.model_checks import number_of_classes
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.inspection.attention_maps import Detections, Detector, Picture, load_weights
from plugin_core.inspection.recorder import Call


class Detectron2Detector(Detector):
    """A detector of Detectron2.

    Args:
        config_file: a yaml or a LazyConfig, as :func:`d2_plugins.analysis.load_config` takes it.
        weights: path of the checkpoint of the whole detector.
        trust: let the checkpoint run what it asks to run.

    Raises:
        ValueError: if the config is wrong, or the weights are missing or do not fit it.
    """

    def __init__(self, config_file: str, weights: str, *, trust: bool = False) -> None:
        cfg: Any = load_config(config_file)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(cfg, CfgNode) and is_bridge(cfg):
            raise ValueError(
                f"{config_file}: of a detector of MMDetection; use its own config in place of this "
                f"one, with the same weights: {cfg.MODEL.MMDET.CONFIG!r}, or where MODEL.MMDET has "
                "OVERRIDES a config with these based on it"
            )
        if isinstance(cfg, CfgNode):
            cfg.MODEL.DEVICE = device
            model = build_model(cfg)
            datasets = list(cfg.DATASETS.TEST)
            self.input_format = cfg.INPUT.FORMAT
            augmentations = build_augmentation(cfg, is_train=False)
        else:
            model = instantiate(cfg.model).to(device)
            self.batch_size = OmegaConf.select(cfg, "dataloader.test.batch_size") or 1
            names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
            datasets = [names] if isinstance(names, str) else list(names or [])
            self.input_format = model.input_format
            augmentations = instantiate(
                OmegaConf.select(cfg, "dataloader.test.mapper.augmentations")
            )
        self.augmentations = T.AugmentationList(augmentations or [])
        self.model: nn.Module = model.eval().requires_grad_(False)
        load_weights(self.model, weights, trust=trust)
        number = number_of_classes(model)
        if number is None:
            raise ValueError(f"{config_file}: a {type(model).__name__} detects no objects")
        names = tuple(class_names_of(weights) or ()) or (
            _class_names(datasets[0]) if datasets else ()
        )
        # Another number of names belongs to another dataset than the model's.
        self.class_names = names if len(names) == number else tuple(map(str, range(number)))

    def read(self, path: str) -> Picture:
        try:
            image = read_image(path, "RGB")
        except (OSError, SyntaxError) as error:  # of Pillow, for a broken image
            raise ValueError(f"image {path!r} cannot be read: {error}") from error
        ordered = image if self.input_format == "RGB" else image[:, :, ::-1]
        resized = T.AugInput(ordered)
        self.augmentations(resized)
        chw = np.ascontiguousarray(resized.image.transpose(2, 0, 1), dtype=np.float32)
        pixels = torch.from_numpy(chw)[None].to(next(self.model.parameters()).device)
        return Picture(image, pixels, (pixels.shape[2], pixels.shape[3]))

    def detect(self, picture: Picture, pixels: Tensor) -> Detections:
        height, width = picture.image.shape[:2]
        (output,) = self.model([{"image": pixels[0], "height": height, "width": width}])
        found = output["instances"]
        return Detections(found.pred_boxes.tensor.detach(), found.scores, found.pred_classes)

    def evaluate(self, pictures: Sequence[Picture]) -> None:
        sizes = [picture.image.shape[:2] for picture in pictures]
        self.model(
            [
                {"image": picture.pixels[0], "height": height, "width": width}
                for picture, (height, width) in zip(pictures, sizes, strict=True)
            ]
        )

    def last_stage(self) -> str:
        return last_stage(self.model.get_submodule("backbone"))

    def region_extractors(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, ROIPooler)]

    def regions(self, call: Call) -> Tensor:
        return torch.cat([boxes.tensor for boxes in call.args[1]])


def _class_names(dataset: str) -> tuple[str, ...]:
    """Read a dataset's names of its classes; none if the dataset is not known."""
    if "thing_classes" not in MetadataCatalog.get(dataset).as_dict() and dataset in DatasetCatalog:
        DatasetCatalog.get(dataset)  # gathers the names from the annotations
    return tuple(MetadataCatalog.get(dataset).get("thing_classes", ()))
