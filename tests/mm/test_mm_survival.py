"""Trainings survive losses that are not finite, damaged files, and other settings on resuming."""

from __future__ import annotations

import errno
import io
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.logging import MessageHub
from mmengine.optim import AmpOptimWrapper, MultiStepLR, OptimWrapper

from mm_plugins import images
from mm_plugins.checkpoint_files import REPLACING, SafeCheckpointHook
from mm_plugins.images import LoadReadableImage, UnreadableImage, count_left_out
from mm_plugins.launch import arrange, explain_errors
from mm_plugins.non_finite import GuardedOptimWrapper
from mm_plugins.runner import SafeRunner
from mm_plugins.schedules import Changes, replay
from mm_plugins.weights import check_weights, fit_names
from plugin_core import files
from plugin_core.training.checkpoint_files import find_resumable
from plugin_core.training.non_finite import NonFiniteLoss

NAN = float("nan")


# ----------------------------------------------------------------------------------- losses


def guarded(model: nn.Module, **arguments) -> GuardedOptimWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    wrapper = GuardedOptimWrapper(optimizer=optimizer, **arguments)
    wrapper.initialize_count_status(model, 0, 100)
    return wrapper


def step(wrapper, model, value: float = 1.0) -> None:
    with wrapper.optim_context(model):
        loss = (model(torch.full((2, 3), value)) ** 2).mean()
    wrapper.losses = {"loss_cls": loss}
    wrapper.batch = {"data_samples": [SimpleNamespace(metainfo={"img_path": "street.jpg"})]}
    wrapper.update_params(loss)


def test_step_whose_loss_is_not_finite_changes_neither_weights_nor_statistics():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    wrapper = guarded(model)
    step(wrapper, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(wrapper, model, NAN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_many_such_steps_in_a_row_end_with_loss_and_images():
    model = nn.Linear(3, 1)
    wrapper = guarded(model, max_non_finite_steps=2)
    for value in (NAN, 1.0, NAN):
        step(wrapper, model, value)
    with pytest.raises(NonFiniteLoss, match="2 steps in a row.*loss_cls = nan.*street.jpg"):
        step(wrapper, model, NAN)


@pytest.mark.parametrize("bad", [0, 1])
def test_accumulated_update_with_a_bad_part_is_left_out_and_the_next_one_is_whole(bad):
    model = nn.Linear(3, 1)
    wrapper = guarded(model, accumulative_counts=2)
    before = model.weight.clone()
    for i in range(2):
        step(wrapper, model, NAN if i == bad else 1.0)
    assert torch.equal(model.weight, before) and model.weight.grad is None
    step(wrapper, model)
    assert torch.equal(model.weight, before)
    step(wrapper, model)
    assert not torch.equal(model.weight, before) and torch.isfinite(model.weight).all()


# ----------------------------------------------------------------------------------- images


def jpeg() -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


BAD = {"empty": b"", "html": b"<html>Not found</html>", "truncated": jpeg()[:700], "missing": None}


@pytest.fixture(params=BAD)
def bad_image(request, tmp_path) -> str:
    path = tmp_path / "bad.jpg"
    if BAD[request.param] is not None:
        path.write_bytes(BAD[request.param])
    return str(path)


def test_unreadable_image_is_an_error_that_names_it(bad_image):
    with pytest.raises(UnreadableImage, match=r"image '.*bad\.jpg' cannot be read: "):
        LoadReadableImage()({"img_path": bad_image})


def test_unreadable_image_is_passed_over_where_the_pipeline_says_so(bad_image):
    assert LoadReadableImage(ignore_empty=True)({"img_path": bad_image}) is None


def test_unreadable_image_is_left_out_and_counted_if_wanted(bad_image, tmp_path):
    names = str(tmp_path / "names.txt")
    load = LoadReadableImage(left_out=names)
    assert load({"img_path": bad_image}) is None and load({"img_path": bad_image}) is None
    assert "1 unreadable images were left out, 2 times" in count_left_out(names)


def test_unreadable_image_is_named_by_one_of_the_worker_processes(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(images, "print_log", lambda text, *_: told.append(text))
    for _ in range(2):
        load = LoadReadableImage(left_out=str(tmp_path / "names.txt"))
        assert load({"img_path": str(tmp_path / "missing.jpg")}) is None
    assert len(told) == 1 and "missing.jpg" in told[0]


def test_image_above_pillows_limit_is_left_to_opencv(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "large.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert LoadReadableImage()({"img_path": str(tmp_path / "large.tif")})["img_shape"] == (40, 40)


def test_jpeg_damaged_in_the_middle_is_unreadable_where_its_codes_tell(tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "bad.jpg"
    Image.effect_noise((200, 200), 80).save(buffer, "JPEG")
    told = 0
    for seed in range(20):
        data = bytearray(buffer.getvalue())
        middle = len(data) // 2
        data[middle : middle + 400] = random.Random(seed).randbytes(400)
        path.write_bytes(data)
        try:
            LoadReadableImage()({"img_path": str(path)})
        except UnreadableImage as error:
            told += "bad.jpg' cannot be read: it is damaged" in str(error)
    assert told >= 8  # OpenCV alone refuses none


def test_images_without_a_readable_one_are_an_error_in_the_end(bad_image, tmp_path):
    load = LoadReadableImage(left_out=str(tmp_path / "names.txt"))
    with pytest.raises(UnreadableImage, match="1000 images in a row"):
        for _ in range(2000):
            load({"img_path": bad_image})


@pytest.mark.parametrize("tail", [b"", b"\0" * 9, b"more than the image"])
def test_whole_image_is_read_whatever_follows_it(tmp_path, tail):
    (tmp_path / "good.jpg").write_bytes(jpeg() + tail)
    assert LoadReadableImage()({"img_path": str(tmp_path / "good.jpg")})["img_shape"] == (40, 40)


def test_message_of_a_worker_process_is_one_line():
    error = UnreadableImage("Caught …\nTraceback:\nmm_plugins.images.UnreadableImage: image 'a'\n")
    assert str(error) == "image 'a'"


# ------------------------------------------------------------------------------ checkpoints


def save(folder: Path, *steps: int) -> None:
    for number in steps:
        torch.save({"state_dict": {"a": torch.ones(100)}}, folder / f"iter_{number}.pth")
    (folder / "last_checkpoint").write_text(f"/original/iter_{steps[-1]}.pth")


def test_copied_folder_goes_on_from_its_own_last_checkpoint(tmp_path):
    save(tmp_path, 9, 2, 4)  # 9 is of an earlier training
    assert find_resumable(str(tmp_path), "iter_{}.pth") == (str(tmp_path / "iter_4.pth"), [])


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_damaged_checkpoint_is_passed_over(tmp_path, damage):
    save(tmp_path, 2, 4)
    file = tmp_path / "iter_4.pth"
    file.write_bytes({"cut": file.read_bytes()[:500]}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    found, damaged = find_resumable(str(tmp_path), "iter_{}.pth")
    assert found == str(tmp_path / "iter_2.pth") and damaged == [str(file)]


def test_folder_without_a_whole_checkpoint_is_an_error_and_an_empty_one_is_not(tmp_path):
    assert find_resumable(str(tmp_path), "iter_{}.pth") == (None, [])
    (tmp_path / "iter_2.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: '.*iter_2.pth'"):
        find_resumable(str(tmp_path), "iter_{}.pth")


@pytest.mark.parametrize(("out_dir", "begins_anew"), [("s3://runs", False), (None, True)])
def test_a_remote_folder_is_left_to_mmengine(out_dir, begins_anew, tmp_path, monkeypatch):
    monkeypatch.setattr(SafeRunner, "begins_anew", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])
    args = SimpleNamespace(resume="auto", amp=False, config="a.py", work_dir=str(tmp_path))
    hook = {"checkpoint": {"out_dir": out_dir}}
    warnings, path = arrange(args, Config({"default_hooks": hook}), None)
    assert path is None and len(warnings) == begins_anew
    assert SafeRunner.begins_anew is begins_anew


@pytest.mark.parametrize("kind", ["AmpOptimWrapper", AmpOptimWrapper])
def test_mixed_precision_without_a_gpu_is_one_line(kind, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = SimpleNamespace(resume=None, amp=False)
    with pytest.raises(ValueError, match="^optim_wrapper.type='AmpOptimWrapper': .* on a GPU only"):
        arrange(args, Config({"optim_wrapper": {"type": kind}}), None)


def test_more_queries_than_positions_are_one_line():
    class TwoStage:
        num_queries = 5

        def pre_decoder(self, output_memory):
            torch.topk(output_memory[..., 0], self.num_queries, dim=1)

    with pytest.raises(SystemExit) as end, explain_errors():
        TwoStage().pre_decoder(torch.zeros(2, 4, 8))
    assert str(end.value).startswith("error: model.num_queries: 5 queries are chosen among")
    with pytest.raises(RuntimeError, match="another"), explain_errors():
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "0 bytes"), (b"<html></html>", "web page"), (b"PK\3\4", "cut off")],
)
def test_file_that_is_no_checkpoint_is_named_with_its_setting(tmp_path, content, reason):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"load_from: .*a\.pth.*{reason}"):
        check_weights(nn.Linear(2, 2), str(tmp_path / "a.pth"), "load_from", whole=False)


def weights(folder: Path, **tensors: torch.Tensor) -> str:
    torch.save(
        {"state_dict": {k.replace("_", "."): v for k, v in tensors.items()}}, folder / "w.pth"
    )
    return str(folder / "w.pth")


def test_another_number_of_classes_is_warned_of_in_training_and_an_error_in_a_test(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)})
    shapes = {"body_weight": (2, 2), "body_bias": (2,), "head_weight": (5, 2), "head_bias": (5,)}
    path = weights(tmp_path, **{name: torch.ones(shape) for name, shape in shapes.items()})
    (told,) = check_weights(model, path, "load_from", whole=False)
    assert r"head.weight ([5, 2] in the file, [3, 2] in the model)" in told
    with pytest.raises(ValueError, match=r"CHECKPOINT: .*head\.weight"):
        check_weights(model, path, "CHECKPOINT", whole=True)


def test_file_of_which_nothing_fits_is_an_error(tmp_path):
    path = weights(tmp_path, other_weight=torch.ones(2, 2))
    with pytest.raises(ValueError, match="no tensor of .* fits the model"):
        check_weights(nn.Linear(2, 2), path, "load_from", whole=False)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_prefixes_are_taken_off(prefix):
    state = {f"{prefix}{name}": torch.ones(2, 2).half() for name in ("weight", "bias")}
    fit_names({"state_dict": state}, nn.Linear(2, 2))
    assert set(state) == {"weight", "bias"}


# --------------------------------------------------------------------------------- schedules


def test_changed_settings_are_named_with_old_and_new_values():
    text = "optim_wrapper = dict(optimizer=dict(lr={}))\nparam_scheduler = [dict(end={})]\nx = {}"
    changes = Changes(text.format(0.02, 5, 1), text.format(0.01, 6, 2))
    assert str(changes) == "optim_wrapper.optimizer.lr: 0.02 → 0.01, param_scheduler[0].end: 5 → 6"
    assert changes.of_schedule and not Changes(text, text).settings


def test_replayed_schedule_is_that_of_a_training_with_it_from_the_beginning():
    wrapper = OptimWrapper(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))
    schedulers = [MultiStepLR(wrapper, milestones=[3, 8], gamma=0.1, by_epoch=False)]
    replay(schedulers, iterations=5, epochs=0, epoch_length=100)
    assert wrapper.param_groups[0]["lr"] == pytest.approx(0.1)


# ------------------------------------------------------------------------- writing checkpoints


class FullDisk(io.BytesIO):
    def write(self, content) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_checkpoint_on_a_full_disk_leaves_the_old_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "iter_2.pth"
    backend = get_file_backend(str(tmp_path), backend_args=REPLACING)
    backend.put(b"old", str(path))
    monkeypatch.setattr(files, "open", lambda *_: FullDisk(), raising=False)
    refused = pytest.raises(SystemExit, match="No space left .* earlier checkpoints are whole")
    with refused, explain_errors():
        backend.put(b"new", str(path))
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("save_best", ["a", ["a", "b"]])
def test_resume_in_a_copied_folder_leaves_the_originals_best_checkpoint(tmp_path, save_best):
    original, copy = tmp_path / "original", tmp_path / "copy"
    hub = MessageHub.get_instance(f"{tmp_path}{save_best}")
    for folder in (original, copy):
        folder.mkdir()
        for key in "ab":
            (folder / f"best_{key}_iter_2.pth").write_bytes(b"")
    hub.update_info("best_ckpt", str(original / "best_a_iter_2.pth"))
    for key in "ab":
        hub.update_info(f"best_ckpt_{key}", str(original / f"best_{key}_iter_2.pth"))
    runner = SimpleNamespace(
        work_dir=str(copy),
        message_hub=hub,
        logger=logging.getLogger("test_mm_survival"),
        iter=4,
        epoch=0,
        save_checkpoint=lambda folder, filename, **_: Path(folder, filename).write_bytes(b""),
    )
    hook = SafeCheckpointHook(by_epoch=False, save_best=save_best, rule="greater")
    hook.before_train(runner)
    hook._save_best_checkpoint(runner, {"a": 1.0, "b": 1.0})
    assert sorted(p.name for p in original.iterdir()) == ["best_a_iter_2.pth", "best_b_iter_2.pth"]
    left = "best_b_iter_2.pth" if save_best == "a" else "best_b_iter_4.pth"
    assert sorted(p.name for p in copy.iterdir()) == ["best_a_iter_4.pth", left]


def test_old_checkpoint_is_removed_only_when_the_new_one_is_written(tmp_path):
    there: list[list[str]] = []

    def save_checkpoint(out_dir: str, name: str, *_: object, **__: object) -> None:
        there.append(sorted(path.name for path in tmp_path.glob("*.pth")))
        (tmp_path / name).write_bytes(b"")

    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        message_hub=MessageHub.get_instance(tmp_path.name),
        logger=logging.getLogger("test_mm_survival"),
        save_checkpoint=save_checkpoint,
    )
    hook = SafeCheckpointHook(by_epoch=False, max_keep_ckpts=1)
    hook.before_train(runner)
    for step in (2, 4):
        hook._save_checkpoint_with_step(runner, step, {})
    assert there == [[], ["iter_2.pth"]]
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_4.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_4.pth")
