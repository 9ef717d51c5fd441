"""The checkpoints that triplet attention's authors published evaluate without any conversion.

They cannot be downloaded here, so the tests write such files: the shipped configs' detectors with
random weights, under the names and with the rest of what the authors' frameworks saved in 2020.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2_sample import register
from detectron2_sample import results as detectron2_results
from mmdet.apis import init_detector
from mmdet_sample import options, results
from published_triplet_attention import published, resnet_features
from torch import Tensor, nn

from d2_plugins import add_plugin_config, merge_config
from mm_plugins.weights import fit_names
from plugin_core import BlockPlugin

ROOT = Path(__file__).resolve().parents[2]
NARROW_HEADS = (
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32,)", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
)
NARROW = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", *NARROW_HEADS),
)
FASTER_RCNN = "configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml"


def randomize(model: nn.Module) -> nn.Module:
    """Give norms and gates values as training does; ``alpha`` is 1, which is the published gate."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                module.weight.uniform_(0.1, 0.9)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, BlockPlugin) and module.alpha is not None:
                module.alpha.fill_(1)
    return model.eval()


# --------------------------------------------------------------------------------------- Detectron2


def detectron2_detector(config: str, *changes: str) -> nn.Module:
    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, str(ROOT / config), ["MODEL.DEVICE", "cpu", *changes])
    return randomize(build_model(cfg))


def save_as_in_2020(
    model: nn.Module, path: Path, child: str = "triplet_attention", old_gates: bool = True
) -> dict[str, Tensor]:
    """Write what the authors' script left, in the format of PyTorch before 1.6."""
    # Buffers that Detectron2 no longer saves: the anchors, and how pixels are normalized.
    extra = {n: b for n, b in model.named_buffers() if ".triplet_attention." not in n}
    state = published({**extra, **model.state_dict()}, child, old_gates)
    gate = f"backbone.bottom_up.res2.0.{child}." + (
        "ChannelGateH.spatial" if old_gates else "cw.conv"
    )
    assert {f"{gate}.conv.weight", f"{gate}.bn.running_var"} < state.keys()
    assert state["pixel_mean"].shape == (3, 1, 1)
    assert any(name.endswith("anchor_generator.cell_anchors.0") for name in state)
    momentum = {"momentum_buffer": torch.zeros(3)}
    content = {
        "model": state,
        "optimizer": {"state": {0: momentum}, "param_groups": [{"lr": 2e-4, "params": [0]}]},
        "scheduler": {"milestones": (60000, 80000), "base_lrs": [0.02], "last_epoch": 90000},
        "iteration": 89999,
    }
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return state


@torch.no_grad()
def outputs_of_blocks(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of all residual blocks of a ResNet in either framework."""
    found: list[Tensor] = []
    stages = [f"res{i}" for i in (2, 3, 4, 5)] if hasattr(backbone, "res2") else backbone.res_layers
    for stage in stages:
        for block in getattr(backbone, stage):
            block.register_forward_hook(lambda *call: found.append(call[-1]))
    backbone(x)
    return found


def assert_as_published(backbone: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Compare all blocks with what the authors' network computes of the file's tensors."""
    x = torch.randn(1, 3, 64, 64)
    found, expected = outputs_of_blocks(backbone, x), resnet_features(state, x, prefix)
    assert len(found) == len(expected) == 16
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 1e-3
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("config", "child", "old_gates"),
    [
        ("COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml", "triplet", False),
        (
            "COCO-Detection/faster_rcnn_R_50_triplet_FPN_published_1x.yaml",
            "triplet_attention",
            True,
        ),
        ("COCO-Detection/retinanet_R_50_triplet_FPN_published_1x.yaml", "pcam", True),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_triplet_FPN_published_1x.yaml", "triplet", True),
        ("COCO-Keypoints/keypoint_rcnn_R_50_triplet_FPN_published_1x.yaml", "pcam", False),
    ],
)
def test_every_tensor_of_a_detectron2_checkpoint_is_loaded(config, child, old_gates, tmp_path):
    config = f"configs/d2/{config}"
    # The authors froze res2, whose norms then count no batches.
    source = detectron2_detector(config, "MODEL.BACKBONE.FREEZE_AT", "2", *NARROW_HEADS)
    state = save_as_in_2020(source, tmp_path / "model.pth", child, old_gates)
    target = detectron2_detector(config, *NARROW_HEADS)
    checkpointer = DetectionCheckpointer(target)
    names = checkpointer._load_model(checkpointer._load_file(str(tmp_path / "model.pth")))
    assert names.missing_keys == []
    assert sorted(names.unexpected_keys) == ["pixel_mean", "pixel_std"]  # the config's are used
    loaded = target.state_dict()
    saved = source.state_dict()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    assert_as_published(target.backbone.bottom_up, state, "backbone.bottom_up.")


def test_detectron2_evaluates_a_published_checkpoint_as_one_of_ours(
    photographs, run_tool, tmp_path
):
    model = detectron2_detector(FASTER_RCNN, *NARROW)
    save_as_in_2020(model, tmp_path / "published.pth", "pcam")
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    settings = {
        "DATASETS.TEST": "('sample_val',)",
        "DATALOADER.NUM_WORKERS": "0",
        "INPUT.MIN_SIZE_TEST": "96",
        "MODEL.RPN.POST_NMS_TOPK_TEST": "50",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
        "TEST.DETECTIONS_PER_IMAGE": "5",
    }
    pairs = [word for pair in settings.items() for word in pair]
    line = ["--config-file", FASTER_RCNN, *register(photographs), "--eval-only", *NARROW, *pairs]
    for name in ("published", "ours"):
        files = ["MODEL.WEIGHTS", tmp_path / f"{name}.pth", "OUTPUT_DIR", tmp_path / name]
        printed = run_tool("train_net.py", *line, *files).stdout
        assert f"Loading from {tmp_path / name}.pth" in printed
        assert "not found in the checkpoint" not in printed
        assert "triplet_attention." not in printed  # the name of a parameter that was not used
    assert detectron2_results(tmp_path / "published") == detectron2_results(tmp_path / "ours") != []


# -------------------------------------------------------------------------------------- MMDetection


@pytest.mark.parametrize(("detector", "child"), [("retinanet", "pcam"), ("faster-rcnn", "triplet")])
def test_every_tensor_of_an_mmdetection_checkpoint_is_loaded(detector, child):
    config = ROOT / f"configs/mm/triplet_attention/{detector}_r50-triplet_fpn_published-1x_coco.py"
    source, target = (randomize(init_detector(config, device="cpu")) for _ in range(2))
    state = published(source.state_dict(), child)
    content = {"state_dict": dict(state)}
    fit_names(content, target)  # as both of MMDetection's tools do
    target.load_state_dict(content["state_dict"], strict=True)
    assert_as_published(target.backbone, state, "backbone.")


def test_mmdetection_evaluates_a_published_checkpoint_as_one_of_ours(
    photographs, run_tool, tmp_path
):
    config = "configs/mm/triplet_attention/retinanet_r50-triplet_fpn_1x_coco.py"
    narrow = {"model.backbone.base_channels": 8, "model.neck.in_channels": [32, 64, 128, 256]}
    model = init_detector(ROOT / config, device="cpu", cfg_options=narrow)
    state = randomize(model).state_dict()
    assert sum(name.endswith("triplet_attention.alpha") for name in state) == 16
    torch.save({"state_dict": state}, tmp_path / "ours.pth")
    theirs = published(state, "triplet")
    gate = "backbone.layer1.0.triplet.ChannelGateH.spatial"
    assert {f"{gate}.conv.weight", f"{gate}.bn.running_var"} < theirs.keys()
    meta = {"mmdet_version": "2.3.0", "epoch": 12, "iter": 87960, "CLASSES": ("person", "car")}
    content = {"meta": meta, "state_dict": theirs}
    torch.save(content, tmp_path / "published.pth", _use_new_zipfile_serialization=False)
    few = {"nms_pre": 100, "score_thr": 0.0, "max_per_img": 10}
    small = {**narrow, **{f"model.test_cfg.{key}": value for key, value in few.items()}}
    tiny = "test_dataloader.dataset.pipeline.1.scale=(160,96)"
    for name in ("published", "ours"):
        settings = options(photographs, tmp_path / name, tiny, model=small)
        printed = run_tool("test_mmdet.py", config, tmp_path / f"{name}.pth", *settings).stdout
        assert f"Load checkpoint from {tmp_path / name}.pth" in printed
        assert "do not match exactly" not in printed
    assert results(tmp_path / "published") == results(tmp_path / "ours") != []
