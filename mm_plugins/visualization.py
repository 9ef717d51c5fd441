"""Runs a trained detector of MMDetection on an image, for a look at its attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mmcv
import torch
from mmcv.transforms import Compose
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.registry import DATASETS, MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import get_test_pipeline_cfg, register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mm_plugins.activations import Activation, last_stage
from mm_plugins.analysis import load_config
from mm_plugins.command_line import has_cuda_operators
from mm_plugins.datasets import number_of_classes
from mm_plugins.grounding.text_models import text_model_is_there
from mm_plugins.scores import Scores, phrase_score
from plugin_core.inspection.attention_maps import (
    Caption,
    Detections,
    Detector,
    Frame,
    Grounder,
    Grounding,
    Picture,
    load_weights,
)
from plugin_core.inspection.recorder import Call, record_calls
from plugin_core.stand_ins import view


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
            model = revert_sync_batchnorm(_build(cfg.model))
            self._transform = Compose(get_test_pipeline_cfg(cfg))
        content = load_weights(model, weights, trust=trust)
        on_gpu = torch.cuda.is_available() and has_cuda_operators()
        self.model: nn.Module = model.to("cuda" if on_gpu else "cpu").eval().requires_grad_(False)
        self.reads_text = hasattr(model, "language_model")
        self.batch_size = (cfg.get("test_dataloader") or {}).get("batch_size") or 1
        self.class_names = () if self.reads_text else self._names_of_classes(cfg, content)

    def _names_of_classes(self, cfg: Config, checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
        names, number = _class_names(cfg, checkpoint), number_of_classes(self.model)
        # Of another dataset than the model's, they would be wrong.
        return names if number in (None, len(names)) else tuple(map(str, range(number)))

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
        if isinstance(getattr(model, "bbox_head", None), BaseDenseHead):
            model = view(model, bbox_head=_differentiable(model.bbox_head))
        with DefaultScope.overwrite_default_scope(self._scope):
            (sample,) = model.test_step(data)
        found = sample.pred_instances
        return Detections(get_box_tensor(found.bboxes).detach(), found.scores, found.labels)

    def evaluate(self, pictures: Sequence[Picture]) -> None:
        model: Any = self.model
        samples = [copy.deepcopy(picture.meta) for picture in pictures]
        pixels = [picture.pixels[0] for picture in pictures]
        with DefaultScope.overwrite_default_scope(self._scope):
            model.test_step({"inputs": pixels, "data_samples": samples})

    def grounder(self, caption: Caption, layer: str | None = None) -> Grounder:
        if not self.reads_text:
            return super().grounder(caption, layer)
        return _Grounder(self.model, self._scope, caption, layer)

    def last_stage(self) -> str:
        return last_stage(self.model)

    def region_extractors(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, BaseRoIExtractor)]

    def regions(self, call: Call) -> Tensor:
        return call.args[1][:, 1:]  # the first number is the image's in the batch


class _Grounder:
    """Looks for phrases; its heatmaps are those of attention mask consistency."""

    def __init__(self, model: Any, scope: str, caption: Caption, layer: str | None) -> None:
        # The config's, if its detector has the setting
        settings = {"name": layer} if layer else getattr(model, "heatmap_settings", {})
        self._model, self._scope = model, scope
        self._activation, self._scores = Activation(model, **settings), Scores(model)
        self._text: dict[str, Any] = {"text": caption.phrases, "custom_entities": True}
        if caption.text is not None:
            spans = [[list(span)] for span in caption.spans()]
            self._text = {"text": caption.text, "tokens_positive": spans}
        self._columns = self._columns_of(caption.phrases)

    def _columns_of(self, phrases: Sequence[str]) -> list[list[int]]:
        """The tokens of each phrase; raises ValueError where some are not read."""
        text, spans = self._text["text"], self._text.get("tokens_positive")
        of_labels, *_ = self._model.get_tokens_positive_and_prompts(
            text, spans is None, None, spans
        )
        end = self._model.language_model.max_tokens - 1  # which is a mark, and no word
        columns: list[list[int]] = [list(of_labels[label + 1]) for label in range(len(phrases))]
        for phrase, tokens in zip(phrases, columns, strict=True):
            if not tokens or max(tokens) >= end:
                raise ValueError(
                    f"phrase {phrase!r}: it has no words, or not all of them are among the first "
                    f"{end + 1} tokens of the text, which are what the model reads "
                    "(language_model.max_tokens)"
                )
        return columns

    def __call__(self, picture: Picture) -> Grounding:
        model = self._model
        sample = copy.deepcopy(picture.meta)
        sample.set_metainfo(self._text)
        with (
            DefaultScope.overwrite_default_scope(self._scope),
            torch.enable_grad(),
            record_calls([model.backbone]) as calls,
            self._activation.record(1) as recorded,
            self._scores.record() as logits_of,
        ):
            data = {"inputs": [picture.pixels[0]], "data_samples": [sample]}
            (result,) = model.test_step(data)
            recorded.differentiate.create_graph = False
            (logits,) = logits_of(1)
            scores = [phrase_score(logits, columns) for columns in self._columns]
            heat = torch.cat([recorded.heatmaps(score)[0] for score in scores])
        height, width = calls[0].args[0].shape[2:]
        frame = Frame(picture.image.shape[:2], picture.input_size, (height, width))
        return Grounding(_detections(result), frame.over_image(heat), self._activation.name)


def _detections(sample: Any) -> Detections:
    found = sample.pred_instances
    boxes = get_box_tensor(found.bboxes).detach().cpu()
    return Detections(boxes, found.scores.detach().cpu(), found.labels.cpu())


def _build(model: ConfigDict) -> nn.Module:
    """Build a detector; one that reads a text such that its phrases can be explained."""
    if "language_model" not in model:
        return MODELS.build(model)
    for part, setting, value in (
        ("encoder", "num_cp", 0),  # activations in checkpoints have no gradient,
        ("bbox_head", "use_checkpoint", False),
        ("test_cfg", "chunked_size", -1),  # and those of all but the last chunk are lost
    ):
        if setting in (model.get(part) or {}):
            model[part][setting] = value
    name = (model.get("language_model") or {}).get("name")
    with text_model_is_there(name, "model.language_model.name"):
        return MODELS.build(model)


def _differentiable(head: Any) -> Any:
    """View of a one-stage head whose scores have gradients; its own are cut off from its maps."""
    if type(head).predict_by_feat is not BaseDenseHead.predict_by_feat:
        return head  # which may have them
    seen = view(head)
    seen.predict_by_feat = partial(_predict_by_feat, seen)
    return seen


def _predict_by_feat(
    head: Any,
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    score_factors: Sequence[Tensor] | None = None,
    *,
    batch_img_metas: Sequence[dict],
    rescale: bool,
) -> list[Any]:
    """``BaseDenseHead.predict_by_feat`` without cutting the maps off from the graph."""
    priors = head.prior_generator.grid_priors(
        [x.shape[2:] for x in cls_scores], dtype=cls_scores[0].dtype, device=cls_scores[0].device
    )
    factors: Any = score_factors or ()
    return [
        head._predict_by_feat_single(
            cls_score_list=[x[i] for x in cls_scores],
            bbox_pred_list=[x[i] for x in bbox_preds],
            score_factor_list=[x[i] for x in factors] or [None] * len(cls_scores),
            mlvl_priors=priors,
            img_meta=meta,
            cfg=None,
            rescale=rescale,
        )
        for i, meta in enumerate(batch_img_metas)
    ]


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
