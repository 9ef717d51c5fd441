"""The quick starts of the documentation, command by command, on a few small scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
from documented_commands import ROOT, commands, files

# What a page shows → less of it
SMALLER = {"400": "8", "100": "4", "128": "64", "600": "6"}
PARTS = {"iter_400.pth": "iter_4.pth", "max_iters=600": "max_iters=6"}
SHORT = {
    "my_detector.yaml": "SOLVER: {MAX_ITER: 4, STEPS: [3], WARMUP_ITERS: 1, IMS_PER_BATCH: 2}\n",
    "my_detector.py": "train_cfg = dict(max_iters=4, val_interval=4)\n"
    "train_dataloader['batch_size'] = 2\n"
    "model['backbone']['base_channels'], model['neck'] = 8, dict(in_channels=[8, 16, 32, 64])\n"
    "default_hooks = dict(checkpoint=dict(interval=4))\n",
}


@pytest.mark.parametrize("page", ["quick_start_detectron2.md", "quick_start_mmdetection.md"])
def test_every_command_of_a_quick_start_runs(page, tmp_path: Path, run_tool, monkeypatch) -> None:
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, text in files(ROOT / "docs" / page).items():
        (tmp_path / name).write_text(text + SHORT[name])
    for command in commands(ROOT / "docs" / page):
        tool, *arguments = (SMALLER.get(word, word) for word in command.words)
        for old, new in PARTS.items():
            arguments = [word.replace(old, new) for word in arguments]
        assert tool.startswith("tools/")
        run_tool(tool.removeprefix("tools/"), *arguments, cwd=tmp_path)
    work = tmp_path / "work_dirs" / "my_detector"
    assert (work / "pictures" / "000000500001_attention.png").is_file()
    assert list(work.rglob("*_results.json")) or (work / "results.bbox.json").is_file()
