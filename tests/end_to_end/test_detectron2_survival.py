"""What ends a run of Detectron2's tools in one line, before or while it trains."""

from __future__ import annotations

import pytest
from detectron2_sample import arguments
from test_detectron2_detectors import TOOL, lazy_arguments

from plugin_core.training.run_folder import occupy


@pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["train", "evaluate"])
@pytest.mark.parametrize(
    ("content", "told"), [(b"", "is empty (0 bytes)"), (b"<html>", "is a web page")]
)
def test_damaged_weights_are_one_clear_line_and_no_folder(
    photographs, run_tool, earlier_run, assert_refused, tmp_path, content, told, flags
):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    line = arguments(photographs, earlier_run, *flags, **{"MODEL.WEIGHTS": str(path)})
    assert_refused(run_tool("train_net.py", *line, check=False), ["MODEL.WEIGHTS: ", told])
    line = lazy_arguments(photographs, earlier_run, *flags, **{"train.init_checkpoint": path})
    assert_refused(run_tool(TOOL, *line, check=False), ["train.init_checkpoint: ", told])


def test_a_second_training_and_mixed_precision_without_a_gpu_are_one_clear_line(
    photographs, run_tool, tmp_path
):
    with occupy(str(tmp_path / "out"), ""):
        result = run_tool("train_net.py", *arguments(photographs, tmp_path / "out"), check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: OUTPUT_DIR: another training (process " in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".training.lock"]
    line = arguments(photographs, tmp_path / "amp", **{"SOLVER.AMP.ENABLED": "True"})
    result = run_tool("train_net.py", *line, check=False)
    assert "error: SOLVER.AMP.ENABLED: mixed precision needs a GPU" in result.stderr
    assert not (tmp_path / "amp").exists()
