"""The shipped configs: each trains a step and evaluates, by mmengine's Runner, on drawn scenes."""

from __future__ import annotations

import copy
import gc
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import mmengine.device.utils
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner

from mm_plugins.pixels import find_mismatches
from mm_plugins.preflight import check_config
from mm_plugins.training_settings import check_training_settings
from plugin_core import BatchFormer, BlockPlugin, IDAClassifier

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from make_synthetic_coco import make_dataset  # noqa: E402

# Those that read a text have tests of their own.
SHIPPED = sorted(
    path
    for path in (ROOT / "configs" / "mm").rglob("*.py")
    if not path.stem.startswith(("grounding", "glip"))
)
CLASSES = ("person", "disk", "square", "triangle", "star", "ring", "cross")
STUFF = ("grass", "sand", "water", "brick", "stone", "sky")
# Few proposals, narrow layers, and detections even from weights that have learned nothing.
SMALL_MODEL = {
    "num_classes": len(CLASSES),
    "fc_out_channels": 64,
    "nms_pre": 50,
    "max_per_img": 10,
    "score_thr": 0.0,
    "num_queries": 10,
    "num_dn_queries": 10,
    "feedforward_channels": 64,
}
SMALL_PANOPTIC_MODEL = {
    **SMALL_MODEL,
    "num_classes": len(CLASSES + STUFF),
    "num_things_classes": len(CLASSES),
    "num_stuff_classes": len(STUFF),
    "num_points": 32,
    "batch_augments": None,  # they pad to 1024 pixels
}
PYRAMID = ("in_channels", "out_channels", "feat_channels", "conv_out_channels")
METHODS = ("triplet", "ida", "batchformer", "block_plugins")  # in a config's path
THINGS = {"classes": CLASSES}
PANOPTIC = {"classes": CLASSES + STUFF, "thing_classes": CLASSES, "stuff_classes": STUFF}
SMALL_DATA = {"times": 1, "scale": (64, 64), "scales": [(64, 64)]}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on, which is one step, and two to evaluate on."""
    out = tmp_path_factory.mktemp("scenes") / "coco"
    make_dataset(out, train=2, val=2, size=64, progress=False)
    return out


def dicts(node: Any) -> list[dict]:
    """The dictionaries of a config, from the outermost on."""
    if isinstance(node, (list, tuple)):
        return [inner for value in node for inner in dicts(value)]
    if not isinstance(node, dict):
        return []
    return [node, *(inner for value in node.values() for inner in dicts(value))]


def replace(node: Any, values: dict[str, Any]) -> None:
    """Set ``values`` wherever the config has such a key."""
    for inner in dicts(node):
        inner.update({key: value for key, value in values.items() if key in inner})


def is_pretrained(cfg: Config) -> bool:
    init_cfg = cfg.model.backbone.init_cfg
    return init_cfg is not None and init_cfg.type == "Pretrained"


def narrow(model: dict) -> None:
    """Give a ResNet 8 channels to begin with, a pyramid 32, and a DETR few layers."""
    if model.get("neck", {}).get("type") == "FPN":
        for inner in dicts(model):
            inner.update({k: 32 for k in PYRAMID if inner.get(k) == 256})
    layers = 1 + max((1, *model.get("batchformer", {}).get("insert_after", ())))
    for coder in dicts(model):
        if coder.get("num_layers", 0) > layers:
            coder["num_layers"] = layers
    if "ResNet" in model["backbone"]["type"]:
        times = model["backbone"].get("base_channels", 64) // 8
        model["backbone"].update(base_channels=8, stem_channels=8)
        where = model["neck"] if "neck" in model else model["panoptic_head"]
        where["in_channels"] = [channels // times for channels in where["in_channels"]]
        if "neck" in model and "panoptic_head" in model:
            model["panoptic_head"]["in_channels"] = (32, 64, 128)


def shrink(cfg: Config, data: Path, work_dir: Path) -> None:
    """Leave one step of training and its evaluation, with nothing to download."""
    is_panoptic = "panoptic_head" in cfg.model
    replace(cfg.model, SMALL_PANOPTIC_MODEL if is_panoptic else SMALL_MODEL)
    for loss in dicts(cfg.model):
        if isinstance(loss.get("class_weight"), list):
            loss["class_weight"] = [1.0] * len(CLASSES + STUFF) + [0.1]
    narrow(cfg.model)
    if getattr(cfg, "load_from", None):  # a detector whose mask head alone is trained
        cfg.load_from = str(work_dir / "detector.pth")
        state = MODELS.build(copy.deepcopy(cfg.model)).state_dict()
        state["bbox_head.fc_cls.bias"][0] = 10.0  # boxes are those of things
        torch.save({"state_dict": state}, cfg.load_from)
    for split in ("train", "val"):
        loader = cfg[f"{split}_dataloader"]
        replace(loader.dataset, SMALL_DATA)
        for dataset in dicts(loader.dataset):
            if "ann_file" in dataset:
                dataset.update(data_root=str(data), metainfo=PANOPTIC if is_panoptic else THINGS)
            if dataset.get("type") == "LVISV1Dataset":  # which wants LVIS's own fields
                images = {"img": f"{split}2017/"}
                annotations = f"annotations/instances_{split}2017.json"
                dataset.update(type="CocoDataset", ann_file=annotations, data_prefix=images)
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    for evaluator in dicts(cfg.val_evaluator):
        for key in {"ann_file", "seg_prefix"} & evaluator.keys():
            evaluator[key] = str(data / "annotations" / Path(evaluator[key]).name)
        if evaluator["type"] == "LVISMetric":
            evaluator["type"] = "CocoMetric"
            evaluator["ann_file"] = str(data / "annotations" / "instances_val2017.json")
    length = "max_iters" if "max_iters" in cfg.train_cfg else "max_epochs"
    cfg.merge_from_dict(
        {
            # Not the default, which begins with residual branches that are 0.
            "model.backbone.init_cfg": {
                "_delete_": True,
                "type": "Normal",
                "layer": "Conv2d",
                "std": 0.02,
            },
            f"train_cfg.{length}": 1,
            "train_cfg.val_begin": 2,  # after the training: `val` returns what it finds
            "default_hooks.checkpoint": None,
            "randomness.seed": 0,
            "log_level": "WARNING",
            "visualizer.name": str(work_dir),
            "work_dir": str(work_dir),
        }
    )


def watch_gradients(model: nn.Module) -> dict[str, Tensor]:
    """What the parameters will have got when a step is over."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: gradients.update({name: grad.clone()}))
    return gradients


def plugin_parameters(model: nn.Module) -> dict[str, bool]:
    """The methods' parameters, and whether each has an influence while alpha is 0."""
    learns: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, (BlockPlugin, IDAClassifier, BatchFormer)):
            cold = getattr(module, "alpha", None) is None
            for parameter, _ in module.named_parameters():
                learns[f"{name}.{parameter}"] = cold or parameter == "alpha"
    return learns


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_trains_a_step_and_evaluates(path, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "cpu")  # mmcv may lack its CUDA operators
    # Of which a step is the smaller part
    monkeypatch.setattr(Config, "pretty_text", "")
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    cfg = Config.fromfile(path)
    if any(node.get("type") == "PanopticQualityMetric" for node in dicts(cfg.val_evaluator)):
        pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    check_training_settings(cfg, train=True)
    assert find_mismatches(cfg) == []
    pretrained = is_pretrained(cfg)
    shrink(cfg, scenes, tmp_path)
    check_config(cfg, train=True, resumes=False)
    runner = Runner.from_cfg(cfg)
    gradients = watch_gradients(runner.model)
    # Before the training, as a distributed one does it: parameters without a gradient stop it.
    expected = {name for name, p in runner.model.named_parameters() if p.requires_grad}
    runner.train()

    assert runner.iter == 1
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    assert set(gradients) == expected
    plugins = plugin_parameters(runner.model)
    assert bool(plugins) == any(word in str(path.relative_to(ROOT)) for word in METHODS)
    # Weights that hold no attention must not leave it frozen, nor be spoiled by it.
    holds_attention = "_published-" in path.name
    partly_frozen = holds_attention or cfg.model.get("trains") == "masks"
    assert (set(plugins) <= set(gradients)) != partly_frozen
    blocks = [module for module in runner.model.modules() if isinstance(module, BlockPlugin)]
    assert holds_attention or all(block.alpha is not None or not pretrained for block in blocks)
    for name, learns in plugins.items():
        if name not in expected:
            continue
        assert torch.isfinite(gradients[name]).all(), name
        # A bias of all keys alike moves no softmax. A cold spatial gate's norm begins at 0.
        if not name.endswith(("k_proj.bias", "module.hw.conv.conv.weight")):
            assert bool(gradients[name].any()) == learns, name

    if "panoptic-detr" in path.stem:
        runner.model.bbox_head.fc_cls.bias.data[0] = 10.0  # some boxes are those of things
    metrics = runner.val()
    has_masks = "mask" in path.stem or "coco_panoptic/PQ" in metrics
    assert has_masks == ("mask" in path.stem or path.stem.startswith("panoptic-detr_"))
    kinds = ("bbox", "segm") if has_masks else ("bbox",)
    assert {name for name in metrics if name.endswith("_mAP")} == {f"coco/{k}_mAP" for k in kinds}


def test_there_are_shipped_configs():
    assert SHIPPED


def test_mobilenets_pyramid_has_the_strides_of_retinanets_anchors():
    (path,) = (p for p in SHIPPED if p.stem == "retinanet_mobilenetv2-triplet_fpn_1x_coco")
    cfg = Config.fromfile(path)
    check_training_settings(cfg, train=True)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    model.eval()
    with torch.no_grad():
        sizes = [feature.shape[-1] for feature in model.extract_feat(torch.randn(1, 3, 128, 128))]
    assert [128 // size for size in sizes] == cfg.model.bbox_head.anchor_generator.strides
