"""Config files on Detectron2's own, command-line options, and errors that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone

from d2_plugins import add_plugin_config, merge_config
from plugin_core import BlockPlugin

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "d2").rglob("*.yaml"))
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def as_detectron2_merges_it(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return cfg


def test_plugins_are_off_by_default():
    cfg = get_cfg()
    add_plugin_config(cfg)
    assert cfg.MODEL.RESNETS.PLUGINS == []
    del cfg.MODEL.RESNETS["PLUGINS"]
    assert dict(cfg.MODEL.ROI_BOX_HEAD.IDA) == {
        "NUM_HEADS": 4,
        "BETA": 1 / 32,
        "NUM_MIXERS": 2,
        "HEAVY": False,
        "SAMPLE_ORDER": "heads",
        "LAST_HEAD_NORM": False,
    }
    assert dict(cfg.MODEL.AMC) == {
        "ACTIVATION": "",
        "LEVELS": (),
        "MEAN_WEIGHT": 0.2,
        "MAX_WEIGHT": 0.8,
        "MEAN_MARGIN": 0.1,
        "MAX_MARGIN": 0.5,
        "EVERY": 1,
        "CLASSES": 1,
        "BOXES": "all",
        "RESOLUTION": "auto",
    }
    del cfg.MODEL["AMC"]
    assert dict(cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER) == {
        "ENABLED": False,
        "NUM_HEADS": 4,
        "DROPOUT": 0.5,
        "NUM_LAYERS": 1,
        "GATHER": False,
    }
    assert dict(cfg.MODEL.MMDET) == {"CONFIG": "", "OVERRIDES": []}
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.LR_FACTORS) == ("SGD", [])
    assert (cfg.SOLVER.MAX_NON_FINITE_STEPS, cfg.INPUT.SKIP_BAD_IMAGES) == (20, False)
    for key in ("IDA", "BATCHFORMER"):
        del cfg.MODEL.ROI_BOX_HEAD[key]
    for key in ("OPTIMIZER", "LR_FACTORS", "MAX_NON_FINITE_STEPS"):
        del cfg.SOLVER[key]
    del cfg.INPUT["SKIP_BAD_IMAGES"]
    del cfg.MODEL["MMDET"]
    assert cfg == get_cfg()


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name",
    [
        FASTER_RCNN,
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",  # has a base with a base
    ],
)
def test_base_in_the_model_zoo_and_its_own_bases_are_merged(tmp_path, name):
    cfg = get_cfg()
    merge_config(cfg, write(tmp_path, f'_BASE_: "model_zoo://{name}"\n'))
    assert cfg == as_detectron2_merges_it(name)


def test_file_overrides_its_base_and_options_override_the_file(tmp_path, cfg):
    text = f'_BASE_: "model_zoo://{FASTER_RCNN}"\nSOLVER: {{BASE_LR: 0.5, MAX_ITER: 7}}\n'
    assert as_detectron2_merges_it(FASTER_RCNN).SOLVER.MAX_ITER == 90000
    merge_config(cfg, write(tmp_path, text), ["SOLVER.MAX_ITER", "8"])
    assert cfg.SOLVER.BASE_LR == 0.5 and cfg.SOLVER.MAX_ITER == 8
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


def test_local_base_in_another_folder_may_be_on_the_model_zoo(tmp_path, cfg):
    write(tmp_path, f'_BASE_: "model_zoo://{FASTER_RCNN}"\nSEED: 3\n', "bases/base.yaml")
    merge_config(cfg, write(tmp_path, "_BASE_: ../bases/base.yaml\n", "runs/run.yaml"))
    assert cfg.SEED == 3
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


@pytest.mark.parametrize("version", ["VERSION: 1\n", ""])
def test_file_of_an_older_version_is_upgraded_as_detectron2_does(tmp_path, cfg, version):
    path = write(tmp_path, version + "MODEL: {WEIGHT: old.pth}\n")
    merge_config(cfg, path, ["SEED", "3"])
    assert cfg.MODEL.WEIGHTS == "old.pth" and cfg.VERSION == 2 and cfg.SEED == 3
    assert cfg.MODEL.RESNETS.PLUGINS == []


def test_file_without_a_version_or_a_base_is_merged(tmp_path, cfg):
    expected = cfg.clone()
    expected.SEED = 3
    merge_config(cfg, write(tmp_path, "SEED: 3\n"))
    assert cfg == expected


def test_config_of_the_model_zoo_may_be_named_directly(cfg):
    merge_config(cfg, f"model_zoo://{FASTER_RCNN}")
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


def test_no_file_and_no_options_change_nothing(cfg):
    before = cfg.clone()
    merge_config(cfg)
    assert cfg == before


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs" / "d2")))
def test_shipped_config_loads(cfg, path):
    merge_config(cfg, str(path))
    if cfg.MODEL.META_ARCHITECTURE == "MMDetDetector":
        assert cfg.MODEL.MMDET.CONFIG.startswith("mmdet::")
        return
    box_head = cfg.MODEL.ROI_BOX_HEAD
    in_backbone = cfg.MODEL.RESNETS.PLUGINS
    in_head = box_head.NAME == "IDABoxHead" or box_head.BATCHFORMER.ENABLED
    assert ("AMC" in path.name) == cfg.MODEL.META_ARCHITECTURE.startswith("AMC")
    is_plain = path.stem.endswith("_demo")  # to try plugins on
    assert in_backbone or in_head or is_plain or "AMC" in path.name
    assert ("plugin" in cfg.MODEL.BACKBONE.NAME) == bool(in_backbone)
    assert ("Plugin" in cfg.MODEL.ROI_HEADS.NAME) == (in_head or "_C4_" in path.name)
    if any(plugin["NAME"].startswith("timm:") for plugin in in_backbone):
        pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    plugins = [module for module in backbone.modules() if isinstance(module, BlockPlugin)]
    assert bool(plugins) == bool(in_backbone)
    # Weights that hold no attention must not leave it frozen.
    trains = [p.requires_grad for plugin in plugins for p in plugin.parameters()]
    assert all(trains) != ("_published" in path.name)


def test_there_are_shipped_configs():
    assert SHIPPED


# ------------------------------------------------------------------------------------------ options


def test_plugins_are_one_list_on_the_command_line_and_in_a_file(tmp_path, cfg):
    plugins = [
        {"NAME": "triplet_attention", "STAGES": ["res4", "res5"], "WARM_START": True},
        {"NAME": "timm:se", "STAGES": ["res5"], "RD_RATIO": 0.25},
    ]
    merge_config(cfg, "", ["MODEL.RESNETS.PLUGINS", str(plugins)])
    assert cfg.MODEL.RESNETS.PLUGINS == plugins
    text = "MODEL: {RESNETS: {PLUGINS: [{NAME: ida, STAGES: [res5], NUM_HEADS: 2}]}}"
    merge_config(cfg, write(tmp_path, text))  # the list is replaced, not joined
    assert cfg.MODEL.RESNETS.PLUGINS == [{"NAME": "ida", "STAGES": ["res5"], "NUM_HEADS": 2}]


@pytest.mark.parametrize("options", [["SOLVER.BASE_LR"], ["SEED", "1", "SOLVER.BASE_LR"]])
def test_odd_number_of_options_is_refused(cfg, options):
    with pytest.raises(ValueError) as error:
        merge_config(cfg, "", options)
    assert "KEY VALUE, got an odd number" in str(error.value)
    assert str(error.value).endswith(" ".join(options))


# ------------------------------------------------------------------------------------------- errors


def error_of(cfg: CfgNode, file: str = "", options: tuple[str, ...] = ()) -> str:
    with pytest.raises(ValueError) as error:
        merge_config(cfg, file, options)
    return str(error.value)


def test_missing_file_is_named(tmp_path, cfg):
    path = str(tmp_path / "nowhere.yaml")
    assert error_of(cfg, path) == f"config file {path!r}: there is no file {path!r}"


def test_missing_base_is_named_with_the_file(tmp_path, cfg):
    path = write(tmp_path, "_BASE_: nowhere.yaml\n")
    message = error_of(cfg, path)
    assert message.startswith(f"config file {path!r}: ")
    assert repr(str(tmp_path / "nowhere.yaml")) in message


def test_base_that_the_model_zoo_lacks_is_named(tmp_path, cfg):
    path = write(tmp_path, '_BASE_: "model_zoo://COCO-Detection/faster_rcnn_R_5_FPN_1x.yaml"\n')
    assert error_of(cfg, path) == (
        f"config file {path!r}: Detectron2's model zoo has no config "
        "'COCO-Detection/faster_rcnn_R_5_FPN_1x.yaml'"
    )


@pytest.mark.parametrize(
    ("text", "wrong", "likely"),
    [
        ("SOLVER: {BASE_RL: 0.1}", "SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        (
            "MODEL: {RESNETS: {PLUGIN: [{NAME: ida, STAGES: [res2]}]}}",
            "MODEL.RESNETS.PLUGIN",
            "MODEL.RESNETS.PLUGINS",
        ),
        ("MODEL: {PLUGINS: []}", "MODEL.PLUGINS", "MODEL.RESNETS.PLUGINS"),
    ],
)
def test_typo_in_a_file_names_the_file_and_the_likely_key(tmp_path, cfg, text, wrong, likely):
    path = write(tmp_path, text)
    message = error_of(cfg, path)
    assert message.startswith(f"config file {path!r}: there is no config key {wrong}; did you mean")
    assert likely in message.split("did you mean")[1]


@pytest.mark.parametrize(
    ("key", "likely"),
    [
        ("SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        ("MODEL.RESNETS.PLUGIN", "MODEL.RESNETS.PLUGINS"),
        ("PLUGINS", "MODEL.RESNETS.PLUGINS"),
        ("IMS_PER_BATCH", "SOLVER.IMS_PER_BATCH"),
    ],
)
def test_typo_on_the_command_line_names_the_likely_key(cfg, key, likely):
    message = error_of(cfg, options=(key, "1"))
    assert message.startswith(f"the command line: there is no config key {key}; did you mean ")
    assert likely in message.split("did you mean ")[1].rstrip("?").split(" or ")


def test_key_that_resembles_none_is_named_without_a_guess(cfg):
    message = error_of(cfg, options=("zzzzzzzz", "1"))
    assert message == "the command line: there is no config key zzzzzzzz"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BASE_LR", "fast"),
        ("MODEL.RESNETS.DEPTH", "[50]"),
        ("MODEL.RESNETS.PLUGINS", "ida"),
    ],
)
def test_wrong_type_names_key_and_value(tmp_path, cfg, key, value):
    message = error_of(cfg, options=(key, value))
    assert key in message and value.strip("[]") in message
    *nodes, last = key.split(".")
    text = "".join(f"{'  ' * i}{n}:\n" for i, n in enumerate(nodes))
    path = write(tmp_path, f"{text}{'  ' * len(nodes)}{last}: {value}\n")
    message = error_of(cfg, path)
    assert key in message and value.strip("[]") in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MODEL.RESNETS.PLUGINS", "ida", "must be a list, got 'ida'"),
        ("MODEL.RESNETS.PLUGINS", "{'NAME': 'ida'}", "must be a list, got {'NAME': 'ida'}"),
        ("MODEL.MASK_ON", "3", "must be True or False, got 3"),
    ],
)
def test_wrong_type_says_what_is_right(cfg, key, value, said):
    assert error_of(cfg, options=(key, value)) == f"the command line: {key}: {said}"


@pytest.mark.parametrize("key", ["TRIPLET_ATTENTION.STAGES", "IDA.NUM_HEADS", "PLUGIN_ORDER"])
def test_key_of_an_earlier_version_is_named_with_the_list(cfg, key):
    message = error_of(cfg, options=(f"MODEL.RESNETS.{key}", "1"))
    assert f"no config key MODEL.RESNETS.{key}; block plugins are one list, MODEL.RES" in message


def test_option_below_a_value_is_named(cfg):
    message = error_of(cfg, options=("MODEL.RESNETS.DEPTH.STAGES", "1"))
    assert "MODEL.RESNETS.DEPTH.STAGES" in message


@pytest.mark.parametrize(
    "text",
    ["MODEL: {MASK_ON: True\n", "SEED: 1\n\tVERSION: 2\n", "- SEED\n", "SEED\n", "", "# SEED: 1\n"],
)
def test_file_that_is_no_yaml_mapping_is_named(tmp_path, cfg, text):
    path = write(tmp_path, text)
    assert path in error_of(cfg, path)
