"""tools/compare_detectors.py with checkpoints of both frameworks, which it evaluates itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import compare_detectors
import pytest
import torch
from test_try_plugins import CONFIG as D2_CONFIG

from plugin_core.evaluation.comparison import costs, evaluations

MM_CONFIG = """
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=7),
    ),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0)),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
test_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file="another.json",
        metainfo=dict(
            classes=("person", "disk", "square", "triangle", "star", "ring", "cross")
        ),
        pipeline=test_pipeline,
    ),
)
"""


def write_detectron2(folder: Path) -> str:
    pytest.importorskip("detectron2")
    from detectron2.modeling import build_model

    from d2_plugins.analysis import load_config

    (folder / "tiny.yaml").write_text(D2_CONFIG)
    cfg = load_config(str(folder / "tiny.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    return f"{folder / 'tiny.yaml'}:{folder / 'model.pth'}"


def write_mmdetection(folder: Path) -> str:
    pytest.importorskip("mmdet")
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    from mm_plugins.analysis import load_config

    (folder / "tiny.py").write_text(MM_CONFIG)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(load_config(str(folder / "tiny.py")).model)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / "epoch_1.pth")
    return f"{folder / 'tiny.py'}:{folder / 'epoch_1.pth'}"


def weights_of(checkpoint: str) -> dict[str, torch.Tensor]:
    content = torch.load(checkpoint.rpartition(":")[2], weights_only=True)
    return content.get("model") or content["state_dict"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tool_server: Any) -> list[str]:
    """The commands of evaluations, which the tool server starts."""
    commands: list[str] = []

    def start(_launcher: Any, command: list[str], log: Path, _place: int) -> Any:
        commands.append(Path(command[1]).name)
        return tool_server.start([str(word) for word in command[1:]], log, log)

    monkeypatch.setattr(evaluations.LocalLauncher, "start", start)
    return commands


def options(drawn_coco: Path, out: Path, *detectors: str) -> list[str]:
    labels = drawn_coco / "annotations/instances_val2017.json"
    words = [labels, "--images", drawn_coco / "val2017", "--out", out, "--resamples", 100]
    return [str(word) for word in words] + [w for d in detectors for w in ("--detector", d)]


@pytest.mark.parametrize(
    ("write", "tool", "batches"),
    [
        (write_detectron2, "train_net.py", {"1": 2}),
        (write_mmdetection, "test_mmdet.py", {"1": 2, "2": 2}),
    ],
)
def test_checkpoint_is_evaluated_once(
    drawn_coco, tmp_path, started, monkeypatch, write, tool, batches
):
    monkeypatch.setattr(compare_detectors, "analyses", lambda *_: [])
    monkeypatch.setattr(costs, "ROUNDS", (1, 2))
    checkpoint = write(tmp_path)
    out = tmp_path / "out of it, here"
    arguments = options(drawn_coco, out, f"a/b={checkpoint}")
    compare_detectors.main(arguments)
    accuracy, cost = json.loads((out / "report.json").read_text())["sections"]
    assert len(accuracy["data"]["a/b"]) == 1 and accuracy["data"]["a/b"][0]["metrics"]["AP"] >= 0
    found = cost["data"]["a/b"]
    assert found["size"][0] == 64 and found["notes"] == []
    parameters = sum(one.numel() for one in weights_of(checkpoint).values())
    assert 0.9 * parameters < found["parameters"] <= parameters < found["memory"] / 4
    assert {batch: len(rounds) for batch, rounds in found["seconds"].items()} == batches
    (results,) = (out / "evaluations").rglob("*results*.json")
    detections = json.loads(results.read_text())
    assert len({one["image_id"] for one in detections}) == 3
    assert all(set(one) >= {"bbox", "score", "category_id"} for one in detections)
    monkeypatch.setattr(compare_detectors, "read_models", lambda *_: {})
    compare_detectors.main(arguments)
    assert started == [tool]
    config, _, weights = checkpoint.rpartition(":")
    truth = evaluations.GroundTruth(arguments[0], arguments[2])
    os.utime(weights, (0, 0))  # other weights
    changed = evaluations.Checkpoint(config, weights)
    assert not evaluations.Task("a/b", 0, changed, truth, "bbox", out).is_done()


def test_failed_evaluation_ends_with_its_log(drawn_coco, tmp_path, started):
    (tmp_path / "tiny.yaml").write_text(D2_CONFIG)
    (tmp_path / "model.pth").write_bytes(b"PK cut off")
    checkpoint = f"plain={tmp_path}/tiny.yaml:{tmp_path}/model.pth"
    with pytest.raises(SystemExit) as stop:
        compare_detectors.main(options(drawn_coco, tmp_path / "out", checkpoint))
    message = str(stop.value.code)
    assert message.startswith("error: plain-seed0: its evaluation failed:\n")
    assert "model.pth' is cut off; download or write it again" in message
    assert message.endswith(f"see {tmp_path}/out/evaluations/plain-seed0/output.txt")
    assert started and not (tmp_path / "out/report.md").exists()
