"""BLIP with AMC, and VQA with functional entropy, tiny and on drawn scenes, by the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_blip import SIZE, grounding, make_bert, retrieval, write_refcoco
from tiny_vqa import settings, write_vqa_cp
from tool_server import ROOT

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")
pytest.importorskip("transformers", reason="transformers, which BLIP needs, is absent")

TINY = {"AMCBlipGrounding": grounding, "AMCBlipRetrieval": retrieval}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("blip-base-amc_8xb16_refcoco", "AMCBlipGrounding"),
        ("blip-base-amc-itm_8xb32_refcoco+", "AMCBlipRetrieval"),
    ],
)
def test_the_configs_train_and_play_the_pointing_game(
    run_tool, config: str, kind: str, drawn_coco: Path, tmp_path: Path
) -> None:
    words = write_refcoco(drawn_coco, tmp_path / "refcoco")
    bert = tmp_path / "bert"
    model = TINY[kind](bert, make_bert(bert, " ".join(words)))
    for part in {"visual_encoder", "vision_backbone"} & set(model):
        model[part]["_delete_"] = True
    small = f"dict(step, scale=({SIZE}, {SIZE}))"
    lines = [
        f"_base_ = {str(ROOT / 'configs/mmpretrain/amc' / config) + '.py'!r}",
        f"model = dict({', '.join(f'{k}={v!r}' for k, v in model.items())})",
        "load_from = None",
        "train_cfg = dict(max_epochs=1)",
        "default_hooks = dict(logger=dict(interval=1))",
    ]
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        files = {
            "data_root": str(tmp_path / "refcoco"),
            "data_prefix": str(drawn_coco / f"{split}2017"),
            "ann_file": f"instances_{split}.json",
            "split_file": f"refs_{split}.p",
            "split": split,
        }
        lines.append(
            f"{loader}_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, "
            f"dataset={files!r})"
        )
    lines += [
        "for loader in (train_dataloader, val_dataloader, test_dataloader):",
        "    steps = _base_.train_pipeline if loader is train_dataloader else _base_.test_pipeline",
        f"    small = [{small} if step['type'] == 'Resize' else step for step in steps]",
        "    loader['dataset']['pipeline'] = small",
    ]
    path = tmp_path / "tiny.py"
    path.write_text("\n".join(lines) + "\n")
    work = tmp_path / "work"
    log = run_tool("train_mmpretrain.py", path, "--work-dir", work).stdout
    found = re.findall(r"loss_amc_mean: (\S+)\s+loss_amc_max: (\S+)", log)
    assert len(found) == 3 and all(float(max_loss) > 0 for _, max_loss in found)
    accuracy = re.findall(r"pointing_game/accuracy: (\S+)", log)
    assert len(accuracy) == 1

    result = run_tool(
        "test_mmpretrain.py", path, work / "epoch_1.pth", "--work-dir", tmp_path / "test"
    )
    assert re.findall(r"pointing_game/accuracy: (\S+)", result.stdout) == accuracy
    if kind == "AMCBlipGrounding":
        return

    flickr = ROOT / "configs/mmpretrain/amc/blip-base-amc-itm_pointing-game_flickr30k.py"
    dataset = {
        "data_root": "",
        "data_prefix": {"img": f"{drawn_coco}/val2017/"},
        "ann_file": str(drawn_coco / "annotations/grounding_val2017_flickr30k.json"),
    }
    path = tmp_path / "flickr30k.py"
    path.write_text(
        f"_base_ = {str(flickr)!r}\n"
        f"{lines[1]}\n"
        f"test_dataloader = dict(num_workers=0, persistent_workers=False, dataset={dataset!r})\n"
        "for step in _base_.test_pipeline:\n"
        f"    if step['type'] == 'Resize':\n        step['scale'] = ({SIZE}, {SIZE})\n"
        "test_dataloader['dataset']['pipeline'] = _base_.test_pipeline\n"
    )
    arguments = [path, work / "epoch_1.pth", "--work-dir", tmp_path / "flickr30k"]
    log = run_tool("test_mmpretrain.py", *arguments).stdout
    assert re.search(r"pointing_game/accuracy: \S+\s+pointing_game/chance: \S+", log)


VQA = "functional_entropy/updn_r101-functional-entropy_1xb512-15e_vqa-cp-v2"


def test_the_vqa_config_trains_and_is_evaluated(run_tool, drawn_coco: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(write_vqa_cp(drawn_coco, tmp_path / "data"))
    run_tool("make_tiny_text_model.py", tmp_path / "bert", "--texts", tmp_path / "words.txt")
    answers = tmp_path / "data/vqa-cp/vqacp_v2_train_annotations.json"
    model = settings(tmp_path / "bert", answers)
    loader = {
        "batch_size": 4,
        "num_workers": 0,
        "persistent_workers": False,
        "dataset": {"data_root": str(tmp_path / "data")},
    }
    lines = [
        f"_base_ = {str(ROOT / 'configs/mmpretrain' / VQA) + '.py'!r}",
        f"model = dict({', '.join(f'{k}={v!r}' for k, v in model.items())})",
        f"train_dataloader = val_dataloader = test_dataloader = {loader!r}",
        "train_cfg = dict(max_epochs=1)",
        "default_hooks = dict(logger=dict(interval=1))",
    ]
    path = tmp_path / "tiny.py"
    path.write_text("\n".join(lines) + "\n")
    work = tmp_path / "work"
    log = run_tool("train_mmpretrain.py", path, "--work-dir", work).stdout
    found = re.findall(r"loss_functional_entropy: \S+\s+information_image: (\S+)", log)
    assert len(found) >= 2 and "loss_bias_entropy" in log
    accuracy = re.findall(r"VQA/acc: (\S+)", log)
    assert len(accuracy) == 1

    checkpoint = work / "epoch_1.pth"
    result = run_tool("test_mmpretrain.py", path, checkpoint, "--work-dir", tmp_path / "test")
    assert re.findall(r"VQA/acc: (\S+)", result.stdout) == accuracy

    missing = ["--cfg-options", f"model.tokenizer.name_or_path={tmp_path / 'none'}"]
    result = run_tool("train_mmpretrain.py", path, *missing, check=False)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert error.startswith("error: model.tokenizer.name_or_path: must be the folder of a text")
