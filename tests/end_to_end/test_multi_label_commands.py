"""A multi-label classifier with IDA's head: trained, evaluated and tested on drawn scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
_base_ = {base!r}
model = dict(
    backbone=dict(depth=18, stem_channels=8, base_channels=8, init_cfg=None),
    head=dict(num_classes=7, in_channels=64, num_heads=2),
)
data_preprocessor = dict(num_classes=7)
data = dict(data_root={data!r}, metainfo=None)
loader = dict(batch_size=3, num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(ann_file="annotations/instances_train2017.json", data_prefix="train2017", **data),
    **loader,
)
val_dataloader = dict(
    dataset=dict(ann_file="annotations/instances_val2017.json", data_prefix="val2017", **data),
    **loader,
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
default_hooks = dict(checkpoint=dict(save_best=None))
"""


def test_ida_head_trains_on_the_labels_of_a_coco_file_and_is_tested_from_its_checkpoint(
    run_tool, drawn_coco, tmp_path
):
    base = ROOT / "configs" / "mmpretrain" / "ida" / "resnet50-ida_1xb64_coco2014-224px.py"
    config, out = tmp_path / "small.py", tmp_path / "out"
    config.write_text(CONFIG.format(base=str(base), data=str(drawn_coco)))
    run_tool("train_mmpretrain.py", config, "--work-dir", out)
    lines = next(out.glob("*/vis_data/scalars.json")).read_text().splitlines()
    trained = {
        name: value
        for name, value in json.loads(lines[-1]).items()
        if name.startswith("multi-label/")
    }
    names = ("CP", "CR", "CF1", "OP", "OR", "OF1")
    of_top = [f"{name}_top3" for name in names]
    assert {*trained} == {f"multi-label/{n}" for n in ("mAP", *names, *of_top)}
    checkpoint = out / "epoch_1.pth"
    classes = torch.load(checkpoint, weights_only=False)["meta"]["dataset_meta"]["classes"]
    assert classes == ("person", "disk", "square", "triangle", "star", "ring", "cross")

    tested = tmp_path / "tested.json"
    written = ("--out", tested, "--out-item", "metrics")
    run_tool("test_mmpretrain.py", config, checkpoint, "--work-dir", out, *written)
    assert json.loads(tested.read_text()) == pytest.approx(trained)
