"""What trainings of both frameworks survive by: losses, checkpoints, locks and names."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from plugin_core.files import replacing
from plugin_core.training.checkpoint_files import check_readable, find_resumable, is_whole
from plugin_core.training.errors import RunError
from plugin_core.training.names import fit_names
from plugin_core.training.non_finite import (
    NonFiniteGuard,
    NonFiniteLoss,
    copy_statistics,
    restore_statistics,
)
from plugin_core.training.run_folder import OccupiedFolder, occupy
from plugin_core.training.unreadable_images import UnreadableImage, summarize_left_out

GOOD = {"loss_a": torch.tensor(1.0), "loss": torch.tensor(1.0)}
BAD = {"loss_a": torch.tensor(float("nan")), "loss": torch.tensor(float("nan"))}


def test_a_guard_tells_losses_and_images_and_counts_steps_in_a_row():
    guard = NonFiniteGuard(2, "setting")
    assert guard.check(GOOD, ["a.png"]) is None
    assert guard.check(BAD, ["a.png"]) == "loss_a = nan, loss = nan with the images a.png"
    assert guard.check(GOOD, []) is None and guard.in_a_row == 0
    guard.check(BAD, [])
    with pytest.raises(NonFiniteLoss, match=r"2 steps in a row \(setting\); in the last loss_a"):
        guard.check(BAD, ["b.png"])
    assert guard.total == 3


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_wrong_limit_is_refused(limit):
    with pytest.raises(ValueError, match="^setting: must be a whole number from 1"):
        NonFiniteGuard(limit, "setting")


def test_statistics_of_batch_norms_are_given_back():
    model = torch.nn.BatchNorm1d(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = copy_statistics(model)
    model(torch.randn(4, 2) + 3)
    assert not torch.equal(model.running_mean, before["running_mean"])
    restore_statistics(statistics)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model_0000003.pth"
    torch.save({"model": {"weight": torch.arange(1000.0)}}, path)
    return path


def test_damage_is_told_in_a_line(checkpoint):
    content = checkpoint.read_bytes()
    assert is_whole(checkpoint)
    place = content.index(torch.arange(1000.0).numpy().tobytes()) + 9
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for damaged, told in (
        (b"", "is empty"),
        (content[:-500], "cut off"),
        (flipped, "is damaged"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ):
        checkpoint.write_bytes(damaged)
        assert not is_whole(checkpoint)
        with pytest.raises(RunError) as error:
            check_readable(str(checkpoint), "MODEL.WEIGHTS")
        assert str(error.value).startswith("MODEL.WEIGHTS: ") and told in str(error.value)
        assert "\n" not in str(error.value) and repr(str(checkpoint)) in str(error.value)
    checkpoint.unlink()
    assert not is_whole(checkpoint)
    with pytest.raises(RunError, match="MODEL.WEIGHTS: there is no checkpoint"):
        check_readable(str(checkpoint), "MODEL.WEIGHTS")


def found(folder: Path) -> tuple[str, list[str]]:
    path, damaged = find_resumable(str(folder), "model_{}.pth", final=["model_final.pth"])
    return os.path.basename(path or ""), [os.path.basename(one) for one in damaged]


def test_the_newest_whole_checkpoint_is_found(checkpoint):
    folder = checkpoint.parent
    for name in ("model_0000001.pth", "model_0000009.pth", "model_final.pth"):
        (folder / name).write_bytes(checkpoint.read_bytes())
    assert found(folder) == ("model_final.pth", [])
    (folder / "last_checkpoint").write_text(f"{folder}/model_0000003.pth")
    assert found(folder) == ("model_0000003.pth", [])  # those after it are of an earlier training
    checkpoint.write_bytes(b"")
    assert found(folder) == ("model_0000001.pth", ["model_0000003.pth"])
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    assert found(folder) == ("model_0000001.pth", ["model_0000005.pth", "model_0000003.pth"])
    (folder / "model_0000001.pth").unlink()
    with pytest.raises(RunError, match="no checkpoint in .* is whole"):
        found(folder)


def test_numbers_of_checkpoints_may_be_written_in_any_format(checkpoint):
    for number in (2, 10):
        (checkpoint.parent / f"epoch_{number:03d}.pth").write_bytes(checkpoint.read_bytes())
    path, damaged = find_resumable(str(checkpoint.parent), "epoch_{:03d}.pth")
    assert path == str(checkpoint.parent / "epoch_010.pth") and not damaged


def test_a_folder_without_checkpoints_has_nothing_to_resume(tmp_path):
    assert found(tmp_path) == ("", []) == found(tmp_path / "none")


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = (
        "import os, signal\nfrom plugin_core.files import replacing\n"
        f"with replacing({str(path)!r}) as file:\n"
        "    file.write(b'half')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program])
    assert result.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    left = [name for name in os.listdir(tmp_path) if name != "file"]
    assert re.fullmatch(r"file\.part-\d+", left[0])
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


WAITING = """
import os, sys, time
from plugin_core.training.run_folder import occupy
with occupy(sys.argv[1], "OUTPUT_DIR"):
    if os.fork() == 0:
        time.sleep(60)
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_killed(tmp_path):
    command = [sys.executable, "-c", WAITING, str(tmp_path / "run")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        (tmp_path / "run" / "model_final.pth.part-1").write_text("half")
        with pytest.raises(OccupiedFolder) as error, occupy(str(tmp_path / "run"), "OUTPUT_DIR"):
            pass
        assert re.match(rf"OUTPUT_DIR: another training .*{first.pid}", str(error.value))
        first.kill()  # its child, like a worker of a loader, lives on
        first.wait()
        with occupy(str(tmp_path / "run"), "OUTPUT_DIR"):
            assert not (tmp_path / "run" / "model_final.pth.part-1").exists()
    finally:
        os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.parametrize("prefix", ["module.", "model.", "ema_", "a.b."])
def test_a_prefix_is_taken_off_where_most_names_then_fit(prefix):
    wanted = ["a.weight", "a.bias", "b.weight"]
    state = {f"{prefix}{name}": 0 for name in wanted[1:]} | {"other": 1}
    fit_names(state, wanted)
    assert state == {"a.bias": 0, "b.weight": 0}


def test_prefixes_that_fit_alike_are_an_error_that_names_them():
    state = {f"{prefix}{name}": 0 for prefix in ("teacher.", "student.") for name in "abc"}
    with pytest.raises(RunError, match=r"^MODEL\.WEIGHTS: .* 'student\.', 'teacher\.'"):
        fit_names(state, ["a", "b", "c"], "MODEL.WEIGHTS")
    assert len(state) == 6
    del state["teacher.b"]
    fit_names(state, ["a", "b", "c"])
    assert set(state) == {"a", "b", "c"}


def test_names_that_fit_stay_and_so_do_those_that_never_would():
    for state in ({"a": 1, "x.a": 2}, {"x.a": 1, "x.other": 2}, {"other": 1}, {}):
        before = dict(state)
        fit_names(state, ["a", "b", "c"])
        assert state == before


def test_an_error_keeps_its_line_through_a_workers_wrapping():
    error = UnreadableImage("image 'a' cannot be read")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    wrapped = f"Caught UnreadableImage in worker.\nTraceback\nm.UnreadableImage: {error}\n"
    assert str(UnreadableImage(wrapped)) == str(error)


def test_images_left_out_are_counted_and_a_few_named():
    assert summarize_left_out(Counter()) is None
    names = Counter({f"{i}.png": 2 for i in range(7)})
    told = summarize_left_out(names)
    assert told is not None and told.startswith("7 unreadable images were left out, 14 times")
    assert told.endswith("'4.png', …")


def test_weights_of_a_training_that_diverged_are_refused(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"model": {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}}, path)
    with pytest.raises(RunError, match="not finite, first in 'b'"):
        check_readable(path, "MODEL.WEIGHTS")
