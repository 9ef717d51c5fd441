"""What tools/train_net.py finds out before it builds or writes anything."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import Tensor, nn

from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.command_line import parse_args, run
from d2_plugins.config import load_lazy_config, merge_config
from d2_plugins.datasets import register_coco
from d2_plugins.lazy_preflight import check_lazy_config
from d2_plugins.preflight import check_config

ROOT = Path(__file__).resolve().parents[2]


class Patches(Backbone):
    """Stands for a backbone that is no ResNet of Detectron2's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 16, stride=16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res4": self.conv(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res4": ShapeSpec(channels=64, stride=16)}


@BACKBONE_REGISTRY.register()
def build_mnasnet_backbone(cfg, input_shape):
    return Patches()


@BACKBONE_REGISTRY.register()
def build_my_resnet_backbone(cfg, input_shape):
    return Patches()


CONFIG = ROOT / "configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml"

# A tensor that the models of these tests have: a ResNet's, and one of Patches
FITTING = {
    "backbone.stem.conv1.weight": torch.zeros(8, 3, 7, 7),
    "backbone.conv.weight": torch.zeros(64, 3, 16, 16),
}

IDA = {"NAME": "ida", "STAGES": ["res5"]}

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def good_cfg(resnet_cfg: CfgNode, tiny_coco: tuple[str, str], tmp_path: Path) -> CfgNode:
    """A config that passes every check; its folder of results does not exist yet."""
    register_coco("preflight_train", *tiny_coco)
    register_coco("preflight_val", *tiny_coco)
    resnet_cfg.DATASETS.TRAIN = ("preflight_train",)
    resnet_cfg.DATASETS.TEST = ("preflight_val",)
    resnet_cfg.MODEL.WEIGHTS = ""
    resnet_cfg.MODEL.ROI_HEADS.NUM_CLASSES = resnet_cfg.MODEL.RETINANET.NUM_CLASSES = 1
    resnet_cfg.OUTPUT_DIR = str(tmp_path / "output")
    return resnet_cfg


def error_of(cfg: CfgNode, *, eval_only: bool = False, resume: bool = False) -> str:
    with pytest.raises(ValueError) as error:
        check_config(cfg, eval_only=eval_only, resume=resume)
    return str(error.value)


def resnet_checkpoint(path: Path, blocks: tuple[int, ...]) -> str:
    names = [
        f"res{stage}.{block}.conv{i}.weight"
        for stage, count in enumerate(blocks, start=2)
        for block in range(count)
        for i in (1, 2, 3)
    ]
    torch.save({"model": {**dict.fromkeys(names, torch.zeros(1)), **FITTING}}, path)
    return str(path)


@pytest.mark.parametrize("resume", [False, True])
def test_good_config_passes_and_nothing_is_written(good_cfg, tmp_path, resume, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = good_cfg.clone()
    check_config(good_cfg, eval_only=False, resume=resume)
    assert good_cfg == before
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize(
    ("builder", "right"),
    [
        ("build_resnet_backbone", "build_resnet_plugin_backbone"),
        ("build_resnet_fpn_backbone", "build_resnet_plugin_fpn_backbone"),
        (
            "build_retinanet_resnet_fpn_backbone",
            "build_retinanet_resnet_plugin_fpn_backbone",
        ),
    ],
)
def test_builder_that_takes_no_plugins_is_named_with_the_one_that_does(good_cfg, builder, right):
    good_cfg.MODEL.BACKBONE.NAME = builder
    message = error_of(good_cfg)
    assert message.startswith(f"MODEL.BACKBONE.NAME: {builder!r} takes no plugins")
    assert "MODEL.RESNETS.PLUGINS is [{'NAME': 'triplet_attention'" in message
    assert message.endswith(f"use {right!r}")


def test_builder_without_plugins_passes_where_none_are_set(good_cfg):
    good_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    good_cfg.MODEL.RESNETS.PLUGINS = []
    good_cfg.MODEL.ROI_HEADS.IN_FEATURES = good_cfg.MODEL.RPN.IN_FEATURES = ["p4"]
    good_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    good_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    good_cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    good_cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    check_config(good_cfg, eval_only=False, resume=False)


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        ("ida", ": must be a list such as [{'NAME': 'triplet_attention'"),
        (["ida"], "[0]: must be a mapping with NAME and STAGES such as"),
        ([{"NAME": "ida"}], "[0].STAGES: is missing; got {'NAME': 'ida'}"),
        ([{"STAGES": ["res5"]}], "[0].NAME: is missing; got {'STAGES': ['res5']}"),
        ([{"NAME": 3, "STAGES": ["res5"]}], "[0].NAME: must be a text such as"),
        ([IDA | {"STAGES": "res5"}], "[0].STAGES: must be a list such as ['res4', 'res5'], got"),
        ([IDA | {"STAGES": ["res7"]}], "[0].STAGES: unknown stage 'res7'; there are res2, res3"),
        ([IDA, IDA], "[1]: 'ida' is in res5 already, by MODEL.RESNETS.PLUGINS[0]; name it once"),
        ([IDA, {"NAME": "id", "STAGES": ["res5"]}], "[1].NAME: must be one of"),
        ([IDA | {"NUM_HEAD": 2}], "[0].NUM_HEAD: is no argument; there are num_queries"),
        ([IDA | {"WARM_START": 1}], "[0].WARM_START: must be True or False, got 1"),
    ],
)
def test_wrong_list_of_plugins_is_found(good_cfg, plugins, said):
    good_cfg.MODEL.RESNETS.PLUGINS = plugins
    message = error_of(good_cfg)
    assert message.startswith(f"MODEL.RESNETS.PLUGINS{said}") and "\n" not in message


def test_missing_timm_is_found_with_what_to_install(good_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers.create_attn", None)
    good_cfg.MODEL.RESNETS.PLUGINS = [{"NAME": "timm:se", "STAGES": ["res5"]}]
    assert error_of(good_cfg).startswith(
        "MODEL.RESNETS.PLUGINS[0].NAME: 'timm:se' needs timm: `pip install -e .[timm]` ("
    )


def test_wrong_depth_is_found(good_cfg):
    good_cfg.MODEL.RESNETS.DEPTH = 51
    assert error_of(good_cfg).startswith("MODEL.RESNETS.DEPTH: no ResNet of depth 51")


def test_settings_of_resnets_do_not_matter_to_another_backbone(good_cfg):
    good_cfg.MODEL.BACKBONE.NAME = "build_mnasnet_backbone"
    good_cfg.MODEL.RESNETS.PLUGINS = []
    good_cfg.MODEL.RESNETS.DEPTH = 51
    check_config(good_cfg, eval_only=False, resume=False)


# ----------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_unknown_dataset_names_the_likely_one_and_how_to_register(good_cfg, split):
    good_cfg.DATASETS[split] = ("preflight_trian",)
    message = error_of(good_cfg)
    assert message.startswith(f"DATASETS.{split}: no dataset is registered as 'preflight_trian'")
    assert "did you mean 'preflight_train'" in message
    assert message.endswith("--register-coco preflight_trian ANNOTATIONS.json IMAGES")


def test_dataset_that_resembles_none_gets_no_guess(good_cfg):
    good_cfg.DATASETS.TRAIN = ("zzzzzzzz",)
    message = error_of(good_cfg)
    assert "did you mean" not in message
    assert message.endswith("--register-coco zzzzzzzz ANNOTATIONS.json IMAGES")


def test_training_without_a_training_set_is_refused(good_cfg):
    good_cfg.DATASETS.TRAIN = ()
    assert error_of(good_cfg) == "DATASETS.TRAIN: names no dataset to train on"


def test_evaluation_does_not_ask_for_the_training_set(good_cfg, tmp_path):
    good_cfg.MODEL.WEIGHTS = resnet_checkpoint(tmp_path / "model.pth", (3, 4, 6, 3))
    good_cfg.MODEL.RESNETS.PLUGINS = []
    for names in ((), ("zzzzzzzz",)):
        good_cfg.DATASETS.TRAIN = names
        check_config(good_cfg, eval_only=True, resume=False)


@pytest.mark.parametrize("eval_only", [False, True])
def test_missing_annotation_file_is_found(good_cfg, tiny_coco, tmp_path, eval_only):
    shutil.copy(tiny_coco[0], tmp_path / "moved.json")
    register_coco("preflight_moved", str(tmp_path / "moved.json"), tiny_coco[1])
    (tmp_path / "moved.json").unlink()
    good_cfg.DATASETS.TEST = ("preflight_val", "preflight_moved")
    message = error_of(good_cfg, eval_only=eval_only)
    assert message.startswith("DATASETS.TEST 'preflight_moved': there is no annotation file")


def test_only_a_training_set_that_stands_alone_needs_annotations(good_cfg, tiny_coco, tmp_path):
    content = json.loads(Path(tiny_coco[0]).read_text()) | {"annotations": []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    register_coco("preflight_empty", str(tmp_path / "empty.json"), tiny_coco[1])
    good_cfg.DATASETS.TEST = ("preflight_empty",)
    good_cfg.DATASETS.TRAIN = ("preflight_train", "preflight_empty")
    check_config(good_cfg, eval_only=False, resume=False)
    good_cfg.DATASETS.TRAIN = ("preflight_empty",)
    message = error_of(good_cfg)
    assert message.startswith("DATASETS.TRAIN 'preflight_empty': ")
    assert "error: no annotations" in message


@pytest.mark.parametrize("evaluator_type", ["coco", "coco_panoptic_seg"])
def test_broken_coco_annotations_are_found(good_cfg, tmp_path, evaluator_type):
    (tmp_path / "broken.json").write_text('{"images": [')
    DatasetCatalog.register("preflight_broken", list)
    MetadataCatalog.get("preflight_broken").set(
        json_file=str(tmp_path / "broken.json"), evaluator_type=evaluator_type
    )
    good_cfg.DATASETS.TRAIN = ("preflight_broken",)
    message = error_of(good_cfg)
    assert (
        message.startswith("DATASETS.TRAIN 'preflight_broken': ")
        and "is no JSON: it is cut off" in message
    )


def test_annotations_of_another_format_are_left_alone(good_cfg, tmp_path):
    (tmp_path / "lines.json").write_text('{"a": 1}\n["b"]\n')
    DatasetCatalog.register("preflight_other", list)
    MetadataCatalog.get("preflight_other").set(
        json_file=str(tmp_path / "lines.json"), evaluator_type="pascal_voc"
    )
    good_cfg.DATASETS.TRAIN = ("preflight_other",)
    check_config(good_cfg, eval_only=False, resume=False)


def test_dataset_without_any_metadata_passes(good_cfg):
    DatasetCatalog.register("preflight_bare", list)
    good_cfg.DATASETS.TRAIN = ("preflight_bare",)
    check_config(good_cfg, eval_only=False, resume=False)


def test_missing_image_folder_is_found(good_cfg, tiny_coco, tmp_path):
    register_coco("preflight_images", tiny_coco[0], str(tmp_path / "images"))
    good_cfg.DATASETS.TRAIN = ("preflight_images",)
    assert error_of(good_cfg) == (
        f"DATASETS.TRAIN 'preflight_images': there is no image folder {str(tmp_path / 'images')!r}"
    )


def test_missing_files_of_detectron2s_own_datasets_say_where_it_looks(good_cfg, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    DatasetCatalog.register("preflight_builtin", list)
    metadata = MetadataCatalog.get("preflight_builtin")
    metadata.set(json_file="datasets/none/annotations/none.json", evaluator_type="coco")
    good_cfg.DATASETS.TEST = ("preflight_builtin",)
    assert "(below 'datasets', which DETECTRON2_DATASETS sets)" in error_of(good_cfg)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data/sets")
    assert "DETECTRON2_DATASETS" not in error_of(good_cfg)


def test_missing_files_elsewhere_do_not_mention_detectron2s_folder(good_cfg, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    DatasetCatalog.register("preflight_own", list)
    metadata = MetadataCatalog.get("preflight_own")
    metadata.set(json_file="datasets_of_mine/none.json", evaluator_type="coco")
    good_cfg.DATASETS.TEST = ("preflight_own",)
    assert "DETECTRON2_DATASETS" not in error_of(good_cfg)


# ------------------------------------------------------------------------------------------ weights


def test_evaluation_without_weights_is_refused(good_cfg):
    assert error_of(good_cfg, eval_only=True).startswith("MODEL.WEIGHTS: --eval-only needs")


@pytest.mark.parametrize(
    "weights", ["detectron2://ImageNetPretrained/MSRA/R-50.pkl", "https://example.com/none.pkl"]
)
def test_weights_to_download_are_left_to_detectron2(good_cfg, weights):
    good_cfg.MODEL.WEIGHTS = weights
    check_config(good_cfg, eval_only=False, resume=False)
    check_config(good_cfg, eval_only=True, resume=False)


def test_weights_of_the_models_depth_pass(good_cfg, tmp_path):
    good_cfg.MODEL.WEIGHTS = resnet_checkpoint(tmp_path / "R-50.pth", (3, 4, 6, 3))
    check_config(good_cfg, eval_only=False, resume=False)


def test_options_of_the_loader_after_the_weights_path_are_no_part_of_it(good_cfg, tmp_path):
    path = resnet_checkpoint(tmp_path / "R-50.pth", (3, 4, 6, 3))
    good_cfg.MODEL.WEIGHTS = f"{path}?matching_heuristics=True"
    check_config(good_cfg, eval_only=False, resume=False)


@pytest.mark.parametrize("eval_only", [False, True])
def test_weights_of_another_depth_are_refused(good_cfg, tmp_path, eval_only):
    good_cfg.MODEL.WEIGHTS = resnet_checkpoint(tmp_path / "R-101.pth", (3, 4, 23, 3))
    message = error_of(good_cfg, eval_only=eval_only)
    assert message.startswith("MODEL.WEIGHTS: ")
    assert "holds a ResNet-101, but MODEL.RESNETS.DEPTH is 50" in message


@pytest.mark.parametrize("backbone", ["build_resnet_plugin_backbone", "build_mnasnet_backbone"])
def test_missing_weights_are_refused(good_cfg, backbone):
    good_cfg.MODEL.BACKBONE.NAME = backbone
    good_cfg.MODEL.RESNETS.PLUGINS = []
    good_cfg.MODEL.WEIGHTS = "none.pth"
    assert error_of(good_cfg) == "MODEL.WEIGHTS: there is no checkpoint 'none.pth'"


def test_weights_of_another_backbone_are_not_searched_for_a_resnet(good_cfg, tmp_path):
    good_cfg.MODEL.BACKBONE.NAME = "build_mnasnet_backbone"
    good_cfg.MODEL.RESNETS.PLUGINS = []
    good_cfg.MODEL.WEIGHTS = resnet_checkpoint(tmp_path / "R-101.pth", (3, 4, 23, 3))
    check_config(good_cfg, eval_only=False, resume=False)


def test_weights_do_not_matter_where_a_training_is_resumed(good_cfg, tmp_path):
    good_cfg.MODEL.WEIGHTS = "none.pth"
    (tmp_path / "output").mkdir()
    assert "there is no checkpoint" in error_of(good_cfg, resume=True)
    torch.save({"model": {}}, tmp_path / "output" / "model_0000009.pth")
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000009.pth")
    check_config(good_cfg, eval_only=False, resume=True)
    assert "there is no checkpoint" in error_of(good_cfg, resume=False)


# ------------------------------------------------------------------------------- tools/train_net.py


@pytest.fixture
def setup(
    train_net: ModuleType, tiny_coco: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CfgNode]:
    """Call the script's ``setup`` with a command line that is right but for the words given."""

    def call(*words: str) -> CfgNode:
        options = [
            *("DATASETS.TRAIN", "('train_net_set',)"),
            *("DATASETS.TEST", "('train_net_set',)"),
            *("MODEL.WEIGHTS", ""),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "1"),
        ]
        flags = list(takewhile(lambda word: word.startswith("-") or word.isdigit(), words))
        line = ["train_net.py", "--config-file", str(CONFIG)]
        line += [*flags, "--register-coco", "train_net_set", *tiny_coco]
        monkeypatch.setattr("sys.argv", [*line, *options, *words[len(flags) :]])
        return train_net.setup(parse_args("A tool."))

    return call


def test_setup_gives_a_frozen_config_and_writes_nothing(setup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = setup("SEED", "5")
    assert cfg.is_frozen() and cfg.SEED == 5
    assert cfg.MODEL.RESNETS.PLUGINS[0]["WARM_START"] is True
    assert "train_net_set" in DatasetCatalog
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("available", "device"), [(False, "cpu"), (True, "cuda")])
def test_setup_falls_back_to_the_cpu_where_there_is_no_gpu(setup, available, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    chosen = setup().MODEL.DEVICE
    assert chosen == device


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("MODEL.RESNETS.PLUGINS", "[{'NAME': 'ida', 'STAGES': ['res6']}]"), "stage 'res6'"),
        (
            ("MODEL.RESNETS.PLUGINS", "[{'NAME': 'eca', 'STAGES': ['res5']}]"),
            "PLUGINS[0].NAME: must be one of ",
        ),
        (("SOLVER.BASE_RL", "1"), "did you mean SOLVER.BASE_LR"),
        (("SOLVER.IMS_PER_BATCH", "0"), "SOLVER.IMS_PER_BATCH: must be a whole number, 1 or more"),
        (("SOLVER.LR_FACTORS", "[['b', 1]]"), "SOLVER.LR_FACTORS: is for SOLVER.OPTIMIZER ADAMW"),
        (("INPUT.FORMAT", "L"), "INPUT.FORMAT: 'L' has 1 channel(s), and the model takes 3"),
        (("--eval-only", "INPUT.MIN_SIZE_TEST", "-1"), "INPUT.MIN_SIZE_TEST: must be"),
        (("MODEL.WEIGHTS", "none.pth"), "MODEL.WEIGHTS: there is no checkpoint 'none.pth'"),
        (("DATASETS.TRAIN", "('none',)"), "DATASETS.TRAIN: no dataset is registered as 'none'"),
        (("--eval-only",), "MODEL.WEIGHTS: --eval-only needs"),
        (("--num-gpus", "999"), "--num-gpus 999: PyTorch finds 1 GPUs"),
    ],
)
def test_setup_refuses_what_is_wrong_and_writes_nothing(
    setup, tmp_path, monkeypatch, words, reason
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        setup(*words)
    assert reason in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_several_datasets_can_be_registered(monkeypatch):
    line = "train_net.py --config-file c.yaml --register-coco a b c --register-coco d e f SEED 1"
    monkeypatch.setattr("sys.argv", line.split())
    args = parse_args("A tool.")
    assert args.config_file == "c.yaml" and args.opts == ["SEED", "1"]
    assert args.register_coco == [["a", "b", "c"], ["d", "e", "f"]]


def test_depth_of_a_builder_of_the_users_own_is_not_judged(good_cfg):
    good_cfg.MODEL.BACKBONE.NAME = "build_my_resnet_backbone"
    good_cfg.MODEL.RESNETS.DEPTH = 26
    assert "MODEL.RESNETS.PLUGINS[0]: 'triplet_attention' is in no block" in error_of(good_cfg)
    good_cfg.MODEL.RESNETS.PLUGINS = []
    check_config(good_cfg, eval_only=False, resume=False)


# -------------------------------------------------------------------- datasets that cannot evaluate


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("lvis", "lvis"),
        ("coco_panoptic_seg", "hotcoco"),
        ("cityscapes_instance", "cityscapesscripts"),
    ],
)
def test_package_that_a_dataset_needs_is_asked_for(good_cfg, monkeypatch, kind, package):
    DatasetCatalog.register("needing_a_package", list)
    MetadataCatalog.get("needing_a_package").set(evaluator_type=kind)
    good_cfg.DATASETS.TEST = ("needing_a_package",)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    message = error_of(good_cfg)
    assert f"needs the package {package}: pip install" in message and "DATASETS.TEST" in message


def test_dataset_without_an_evaluator_is_found_before_training(good_cfg):
    DatasetCatalog.register("without_an_evaluator", list)
    MetadataCatalog.get("without_an_evaluator").set(evaluator_type="depth")
    good_cfg.DATASETS.TEST = ("without_an_evaluator",)
    message = error_of(good_cfg)
    assert message.startswith("DATASETS.TEST: ") and "'depth'" in message


def test_missing_folder_of_annotations_is_found(good_cfg, tmp_path):
    MetadataCatalog.get(good_cfg.DATASETS.TEST[0]).set(sem_seg_root=str(tmp_path / "none"))
    assert f"no semantic annotations' folder {str(tmp_path / 'none')!r}" in error_of(good_cfg)


@pytest.mark.parametrize("child", ["triplet_attention", "pcam"])
def test_published_spelling_is_read_where_heuristics_match_names(good_cfg, tmp_path, child):
    name = f"res2.0.{child}.ChannelGateH.spatial.conv.weight"
    content = {"model": {name: torch.ones(1, 2, 7, 7), **FITTING}, "matching_heuristics": True}
    torch.save(content, tmp_path / "weights.pth")
    good_cfg.MODEL.RESNETS.PLUGINS = [{"NAME": "triplet_attention", "STAGES": ["res2"]}]
    good_cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    model = build_model(good_cfg)
    PluginCheckpointer(model).load(str(tmp_path / "weights.pth"))
    assert model.backbone.res2[0].triplet_attention.cw.conv.conv.weight.eq(1).all()


# ------------------------------------------------------------------------------------- LazyConfigs


@pytest.fixture
def lazy_cfg(good_cfg):
    """A shipped LazyConfig on the datasets of ``good_cfg``."""
    lazy = load_lazy_config(str(next((ROOT / "configs" / "d2").rglob("mask_rcnn_*.py"))))
    lazy.dataloader.train.dataset.names = good_cfg.DATASETS.TRAIN[0]
    lazy.dataloader.test.dataset.names = good_cfg.DATASETS.TEST[0]
    lazy.train.init_checkpoint = ""
    lazy.model.roi_heads.num_classes = 1
    return lazy


def lazy_error_of(lazy_cfg, **arguments: bool) -> str:
    with pytest.raises(ValueError) as error:
        check_lazy_config(lazy_cfg, **{"eval_only": False, "resume": False, **arguments})
    return str(error.value)


def test_good_lazy_config_passes(lazy_cfg):
    check_lazy_config(lazy_cfg, eval_only=False, resume=False)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("stages", ["res7"], "stages: unknown stage 'res7'"),
        ("kernal_size", 7, "kernal_size: is no argument; there are kernel_size"),
    ],
)
def test_wrong_plugin_of_a_lazy_config_is_named(lazy_cfg, key, value, reason):
    lazy_cfg.model.backbone.bottom_up.plugins[0][key] = value
    message = lazy_error_of(lazy_cfg)
    assert message.startswith(f"model.backbone.bottom_up.plugins[0].{reason}")


def test_weights_of_a_lazy_config_are_checked(lazy_cfg, tmp_path):
    assert "--eval-only" in lazy_error_of(lazy_cfg, eval_only=True)
    lazy_cfg.train.init_checkpoint = "none.pth"
    assert "train.init_checkpoint" in lazy_error_of(lazy_cfg)
    fitting = {"backbone.bottom_up.stem.conv1.weight": torch.zeros(64, 3, 7, 7)}
    torch.save({"a": torch.zeros(1), **fitting}, tmp_path / "a.pth")
    lazy_cfg.train.init_checkpoint = f"{tmp_path}/a.pth?matching_heuristics=True"
    check_lazy_config(lazy_cfg, eval_only=False, resume=False)


# ------------------------------------------------------------------------------------ command lines


def test_config_of_the_model_zoo_is_found_for_detectron2(train_net, tiny_coco, monkeypatch):
    name = "model_zoo://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    line = ["train_net.py", "--config-file", name, "--register-coco", "zoo_set", *tiny_coco]
    options = ["DATASETS.TRAIN", "('zoo_set',)", "DATASETS.TEST", "('zoo_set',)"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    monkeypatch.setattr("sys.argv", [*line, *options, "MODEL.WEIGHTS", ""])
    args = parse_args("A tool.")
    train_net.setup(args)
    assert Path(args.config_file).is_file()


@pytest.mark.parametrize("gpus", ["0", "1"])
def test_one_process_sets_up_once(monkeypatch, gpus):
    monkeypatch.setattr("sys.argv", ["train_net.py", "--num-gpus", gpus])
    calls: list[str] = []

    def setup(args: Any) -> CfgNode:
        calls.append("setup")
        return CfgNode({"OUTPUT_DIR": ""})

    run(parse_args("A tool."), setup, lambda *_: calls.append("main"))
    assert calls == ["setup", "main"]


# ------------------------------------------------------------------------- mistakes of a first day


def test_misspelt_backbone_is_named_with_the_likely_one(good_cfg):
    good_cfg.MODEL.BACKBONE.NAME = "build_resnet_plugins_fpn_backbone"
    assert "did you mean 'build_resnet_plugin_fpn_backbone'" in error_of(good_cfg)


def test_names_that_detectron2_does_not_load_are_refused_with_the_remedy(good_cfg, tmp_path):
    names = [f"layer1.{block}.conv{i}.weight" for block in range(3) for i in (1, 2, 3)]
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "resnet50.pth")
    good_cfg.MODEL.WEIGHTS = str(tmp_path / "resnet50.pth")
    message = error_of(good_cfg)
    assert "torchvision's or MMDetection's names" in message
    assert f"tools/convert_checkpoint.py {good_cfg.MODEL.WEIGHTS} converted.pth --to d2" in message


def test_batch_that_cannot_be_shared_is_refused(train_net, tiny_coco, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    options = ["MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "3"]
    line = ["train_net.py", "--config-file", str(CONFIG), "--num-gpus", "2", *options]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH: 3 images .* by 2 processes"):
        train_net.setup(parse_args("A tool."))


def test_plain_resnet_of_a_lazy_config_takes_no_attention(lazy_cfg):
    lazy_cfg.model.backbone.bottom_up._target_ = "detectron2.modeling.ResNet"
    assert "build_resnet_with_plugins" in lazy_error_of(lazy_cfg)


@pytest.mark.parametrize(
    ("load", "file", "advice"),
    [
        (lambda path: merge_config(get_cfg(), path), "a.py", "tools/train_mmdet.py"),
        (load_lazy_config, "a.yaml", "tools/train_net.py takes yaml"),
    ],
    ids=["yaml", "lazy"],
)
def test_config_of_another_kind_is_refused_with_the_right_tool(tmp_path, load, file, advice):
    (tmp_path / file).write_text("a = 1\n")
    with pytest.raises(ValueError) as error:
        load(str(tmp_path / file))
    assert advice in str(error.value)


def test_options_after_keys_and_values_are_refused():
    with pytest.raises(ValueError, match="come before keys and values"):
        merge_config(get_cfg(), "", ["SEED", "1", "--eval-only"])
