"""Detectron2's side of trying plugins: which lines of a yaml config insert one, and its runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from d2_plugins.analysis import analyze
from d2_plugins.block_plugins import RESNET_STAGES
from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.config import add_plugin_config, find_config_file, merge_config
from d2_plugins.datasets import register_coco
from d2_plugins.evaluation import check_evaluator
from d2_plugins.evaluation_runs import RESULTS
from d2_plugins.mmdet_bridge import is_bridge
from d2_plugins.preflight import WITH_PLUGINS, check_config
from d2_plugins.registered_datasets import check_datasets
from plugin_core.files import replacing
from plugin_core.inspection.building import silence
from plugin_core.inspection.cost import Cost
from plugin_core.shipped import TOOLS
from plugin_core.training.trials import Plugin, Run

# Detectron2's own classes, and the same with plugins
_WITH_BATCHFORMER = {
    f"{kind}ROIHeads": f"{kind}PluginROIHeads" for kind in ("Standard", "Cascade", "Res5")
}
_WITH_AMC = {"GeneralizedRCNN": "AMCGeneralizedRCNN", "RetinaNet": "AMCRetinaNet"}
# What switches on the head of a type of IoU
_HEADS = {"segm": "MASK_ON", "keypoints": "KEYPOINT_ON"}


class Detectron2Trials:
    """A yaml config of Detectron2 in a trial; see :class:`plugin_core.training.trials.Framework`.

    Args:
        config: path of the user's yaml file, or ``model_zoo://`` or ``d2_plugins://`` and a name.
        datasets: triples of ``--register-coco``, which are registered.
        steps: of a training; the config's own by default.
        iou_type: "bbox", "segm" or "keypoints", which detectors are compared by.

    Raises:
        ValueError: if the config is wrong, or evaluates no one dataset in COCO's format.
    """

    suffix = ".yaml"

    def __init__(
        self,
        config: str,
        datasets: Sequence[Sequence[str]],
        steps: int | None,
        iou_type: str = "bbox",
    ) -> None:
        self.datasets = [list(dataset) for dataset in datasets]
        for name, json_file, images in datasets:
            register_coco(name, json_file, images)
        self.config = find_config_file(config) if "://" in config else os.path.abspath(config)
        cfg = self.cfg = self._read(self.config)
        if is_bridge(cfg):
            raise ValueError(
                f"{config}: is a detector of MMDetection (MODEL.META_ARCHITECTURE 'MMDetDetector');"
                " give MMDetection's config of it"
            )
        self.own_steps = cfg.SOLVER.MAX_ITER
        self.steps = steps or self.own_steps
        self.batch_size = cfg.SOLVER.IMS_PER_BATCH
        tests = cfg.DATASETS.TEST
        check_datasets("DATASETS.TEST", tests)
        if len(tests) != 1 or check_evaluator(tests[0]) != "coco":
            raise ValueError(
                "DATASETS.TEST: must name one dataset in COCO's format, on which plugins are "
                f"compared, got {tests}"
            )
        head = _HEADS.get(iou_type)
        if head and not cfg.MODEL[head]:
            raise ValueError(
                f"--iou-type {iou_type}: the detector finds none, MODEL.{head} is False"
            )

    @property
    def annotations(self) -> str:
        return os.path.abspath(MetadataCatalog.get(self.cfg.DATASETS.TEST[0]).json_file)

    @property
    def images(self) -> str | None:
        return MetadataCatalog.get(self.cfg.DATASETS.TEST[0]).get("image_root")

    def derive(self, plugin: Plugin | None) -> str:
        lines: dict[str, Any] = {}
        if plugin is not None and plugin.config:
            self._check_alike(plugin.config)
            return yaml.safe_dump({"_BASE_": plugin.config})
        if plugin is not None:
            lines = {"MODEL": self._lines(plugin)}
        return yaml.safe_dump({"_BASE_": self.config, **lines}, sort_keys=False)

    def _check_alike(self, config: str) -> None:
        """Check that the user's own variant has the same steps, images a step and test images."""
        cfg = self._read(config)
        for node, key in (
            ("SOLVER", "MAX_ITER"),
            ("SOLVER", "IMS_PER_BATCH"),
            ("DATASETS", "TEST"),
        ):
            if cfg[node][key] != self.cfg[node][key]:
                raise ValueError(
                    f"{config}: {node}.{key} must be {self.cfg[node][key]} as in {self.config}, "
                    f"got {cfg[node][key]}"
                )

    def _lines(self, plugin: Plugin) -> dict[str, Any]:
        """Give what a plugin changes below MODEL."""
        model: Any = self.cfg.MODEL
        if plugin.name == "amc":
            return {"META_ARCHITECTURE": _in_place(_WITH_AMC, model, "META_ARCHITECTURE")}
        if plugin.name == "functional_entropy":
            raise ValueError("is for detectors of MMDetection that read a text")
        if plugin.name == "batchformer_v2":
            raise ValueError(
                f"MODEL.META_ARCHITECTURE: BatchFormer V2 is for DETRs, got "
                f"{model.META_ARCHITECTURE!r}; batchformer_v1 is for RoI heads"
            )
        if plugin.name == "batchformer_v1":
            if model.META_ARCHITECTURE in ("RetinaNet", "AMCRetinaNet"):
                raise ValueError(
                    f"MODEL.META_ARCHITECTURE: BatchFormer V1 is in RoI heads, and a "
                    f"{model.META_ARCHITECTURE} has none"
                )
            if model.ROI_BOX_HEAD.BATCHFORMER.ENABLED:
                raise ValueError("MODEL.ROI_BOX_HEAD.BATCHFORMER: the config has it already")
            heads = _in_place(_WITH_BATCHFORMER, model, "ROI_HEADS.NAME", keeps=True)
            return {
                "ROI_HEADS": {"NAME": heads},
                "ROI_BOX_HEAD": {"BATCHFORMER": {"ENABLED": True}},
            }
        name = _in_place(WITH_PLUGINS, model, "BACKBONE.NAME", keeps=True)
        stages = [RESNET_STAGES[stage - 2] for stage in plugin.stages]
        arguments = {name.upper(): value for name, value in plugin.arguments.items()}
        new = {"NAME": plugin.name, "STAGES": stages, "WARM_START": True, **arguments}
        lines: dict[str, Any] = {
            "BACKBONE": {"NAME": name},
            "RESNETS": {"PLUGINS": [*map(dict, model.RESNETS.PLUGINS), new]},
        }
        if model.BACKBONE.FREEZE_AT >= plugin.stages[0]:
            # A frozen block's plugin would stay as it is.
            lines["BACKBONE"]["FREEZE_AT"] = plugin.stages[0] - 1
        if model.ROI_HEADS.NAME == "Res5ROIHeads" and "res5" in stages:
            lines["ROI_HEADS"] = {"NAME": "Res5PluginROIHeads"}
        return lines

    def settings(self, path: Path) -> Mapping[str, Any]:
        return self._read(str(path))

    def check(self, path: Path) -> int:
        cfg = self._read(str(path))
        if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"  # as tools/train_net.py does
        model = check_config(cfg, eval_only=False, resume=False)
        return sum(parameter.numel() for parameter in model.parameters())

    def cost(self, path: Path) -> Cost:
        with silence():
            return analyze(self._read(str(path))).total

    def initialize(self, seed: int, path: Path) -> None:
        cfg = self._read(self.config)
        cfg.MODEL.DEVICE = "cpu"
        seed_all_rng(seed)
        model = build_model(cfg)
        PluginCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        with replacing(path) as file:
            torch.save({"model": model.state_dict()}, file)

    def run_config(self, base: Path, run: Run | None, folder: Path, steps: int) -> str:
        solver: Any = self._read(str(base)).SOLVER
        settings: dict[str, Any] = {
            "_BASE_": str(base.absolute()),
            "OUTPUT_DIR": str(folder.absolute()),
            "SEED": run.seed if run else 0,
            "TEST": {"EVAL_PERIOD": 0},  # at the end alone
            # A run that is killed goes on from the last one.
            "SOLVER": {"CHECKPOINT_PERIOD": min(solver.CHECKPOINT_PERIOD, max(1, steps // 4))},
        }
        if steps != self.own_steps:
            factor = steps / self.own_steps
            milestones = {round(step * factor) for step in solver.STEPS}
            settings["SOLVER"] |= {
                "MAX_ITER": steps,
                "STEPS": sorted(step for step in milestones if 0 < step < steps),
                "WARMUP_ITERS": round(solver.WARMUP_ITERS * factor),
            }
        if run is None:
            settings["DATASETS"] = {"TEST": []}
        else:
            settings["MODEL"] = {"WEIGHTS": str(run.initial.absolute())}
        return yaml.safe_dump(settings, sort_keys=False)

    def command(self, config: Path, folder: Path, steps: int) -> list[str]:
        register = [word for d in self.datasets for word in ("--register-coco", *d)]
        return [
            sys.executable,
            str(TOOLS / "train_net.py"),
            "--config-file",
            str(config),
            "--resume",
            *register,
        ]

    def log(self, folder: Path) -> list[dict[str, float]]:
        records = []
        with suppress(OSError):
            for line in (folder / "metrics.json").read_text().splitlines():
                with suppress(ValueError):  # of a line that is being written
                    record = json.loads(line)
                    if "time" in record:
                        step = record["iteration"] + 1  # which counts from 0
                        records.append({"step": step, "time": record["time"]})
        return records

    def results(self, folder: Path) -> Path | None:
        path = folder / RESULTS
        return path if path.is_file() else None

    def weights(self, folder: Path, steps: int) -> Path | None:
        path = folder / "model_final.pth"
        return path if path.is_file() else None

    def _read(self, config: str) -> CfgNode:
        cfg = get_cfg()
        add_plugin_config(cfg)
        merge_config(cfg, config)
        return cfg


def _in_place(names: Mapping[str, str], model: Any, key: str, keeps: bool = False) -> str:
    """Name the class with plugins that stands in the place of Detectron2's own."""
    value = model
    for part in key.split("."):
        value = value[part]
    if keeps and value in names.values():
        return value
    if value in names.values():
        raise ValueError(f"MODEL.{key}: is {value!r} already")
    if value not in names:
        raise ValueError(f"MODEL.{key}: must be {' or '.join(names)} to take it, got {value!r}")
    return names[value]
