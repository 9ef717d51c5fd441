"""The drawn dataset is written whole or not at all, and bad arguments are one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_synthetic_coco
import pytest
import synthetic_coco.dataset
from synthetic_coco import ArgumentError, render
from synthetic_coco_cases import make, tree_digest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_main(*arguments: object) -> int:
    return make_synthetic_coco.main([str(argument) for argument in arguments])


def test_an_existing_dataset_is_kept_without_force_and_replaced_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = make(tmp_path / "coco", seed=1)
    before = tree_digest(out)
    command = (out, "--train", 2, "--val", 1, "--size", 64, "--seed", 2)
    assert run_main(*command) == 2
    assert "already exists" in capsys.readouterr().err
    assert tree_digest(out) == before
    assert run_main(*command, "--force") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "2 train and 1 val images" in printed
    assert str(out) in printed
    assert tree_digest(out) == tree_digest(make(tmp_path / "expected", seed=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "expected"]


@pytest.mark.parametrize("name", ["notes.txt", "train2017/photo.jpg", "annotations/stuff.json"])
def test_force_refuses_a_directory_with_foreign_files(tmp_path: Path, name: str) -> None:
    out = make(tmp_path / "coco")
    (out / name).write_text("mine")
    before = tree_digest(out)
    with pytest.raises(ArgumentError, match=name):
        make(out, force=True)
    assert tree_digest(out) == before


def test_force_refuses_a_dataset_of_the_same_layout_that_it_did_not_write(tmp_path: Path) -> None:
    out = make(tmp_path / "coco")
    (out / "annotations/synthetic_coco.json").unlink()
    with pytest.raises(ArgumentError, match="lacks"):
        make(out, force=True)
    assert (out / "annotations/instances_train2017.json").exists()


def test_force_refuses_links_files_and_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "coco")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(ArgumentError, match="not a folder"):
            make(tmp_path / name, force=True)
    for place in (out, out / "annotations"):
        monkeypatch.chdir(place)
        with pytest.raises(ArgumentError, match="current directory"):
            make(out, force=True)
    assert (out / "annotations/instances_train2017.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_the_root_of_all_folders_is_refused(force: bool) -> None:
    with pytest.raises(ArgumentError, match="home" if force else "already exists"):
        make(Path("/"), force=force)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_run_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], exists: bool
) -> None:
    out = tmp_path / "coco"
    if exists:
        make(out)
    before = tree_digest(tmp_path)

    def fail(*arguments: object) -> None:
        raise error("third image")

    monkeypatch.setattr(synthetic_coco.dataset, "render", fail)
    with pytest.raises(error):
        make(out, force=exists, seed=3)
    assert tree_digest(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if exists else [])


def test_what_appears_during_the_run_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "coco"

    def draw(*arguments: object) -> object:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")
        return render(*arguments)

    monkeypatch.setattr(synthetic_coco.dataset, "render", draw)
    with pytest.raises(ArgumentError, match="already exists"):
        make(out)
    assert tree_digest(tmp_path).keys() == {"coco/mine.txt"}


def test_a_terminated_run_cleans_up(tmp_path: Path) -> None:
    script = str(TOOLS / "make_synthetic_coco.py")
    command = [sys.executable, script, "coco", "--train", "100000", "--val", "0", "--size", "64"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 15
        while not list(tmp_path.glob(".coco.partial-*/train2017/*.jpg")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 130
    assert "interrupted; nothing was written" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", -1), "--train: -1 images; give a number from 0"),
        (("--val", -2), "--val: -2 images; give a number from 0"),
        (("--train", 0, "--val", 0), "both are 0"),
        (("--size", 63), "--size: 63 pixels; give a long side of 64"),
        (("--seed", -1), "--seed: -1; give a number of at least 0"),
        (("--classes", 1), "--classes: 1; give a number from 2 to 7"),
        (("--classes", 8), "--classes: 8; give a number from 2 to 7"),
        (("--context-bias", 0.4), "--context-bias: 0.4; give a probability from 0.5 to 1"),
        (("--context-bias", "nan"), "--context-bias: nan; give a probability"),
        (("--imbalance", 0.5), "--imbalance: 0.5; give a ratio of at least 1"),
        (("--imbalance", 4, "--context-bias", 0.9), "give only one of them"),
        (("--classification", "--context-bias", 0.9), "give only one of them"),
        (("--ambiguous", 1.5), "--ambiguous: 1.5; give a share from 0 to 1"),
        (("--ambiguous", "nan"), "--ambiguous: nan; give a share from 0 to 1"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: tuple, message: str
) -> None:
    assert run_main(tmp_path / "coco", "--train", 1, "--val", 1, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    assert run_main(tmp_path / "file/coco", "--train", 1, "--val", 1) == 2
    assert "cannot write in" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentError, match="cannot write in"):
        make(tmp_path / "coco")


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic_coco.dataset, "render", fail)
    assert run_main(tmp_path / "coco", "--train", 1, "--val", 1) == 1
    assert "No space left on device; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
