"""Trainings that survive losses that are not finite, bad images, damaged files and new settings."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import META_ARCH_REGISTRY
from iopath.common.file_io import PathHandler, PathManager
from torch import Tensor, nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from d2_plugins.checkpointer import PluginCheckpointer, check_weights, find_resumable
from d2_plugins.command_line import check_amp, run
from d2_plugins.data import ReadableDataset, ResumableTrainLoader
from d2_plugins.datasets import register_coco
from d2_plugins.trainer import PluginTrainer
from d2_plugins.training_loop import GuardedTrainer
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.training.non_finite import NonFiniteLoss
from plugin_core.training.unreadable_images import UnreadableImage

pytestmark = pytest.mark.usefixtures("registered")
BAD: set[int] = set()  # steps whose loss is not finite
DIVERGED: set[int] = set()  # those that end in an error of Detectron2


@META_ARCH_REGISTRY.register()
class TinyDetector(nn.Module):
    """A batch norm and a layer whose loss depends on the images."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.norm, self.layer, self.calls = nn.BatchNorm2d(3), nn.Linear(3, 1), 0

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        image = torch.stack([s["image"].float().mean((1, 2)) for s in batch])[:, :, None, None]
        loss = self.layer(self.norm(image / 255).flatten(1)).square().mean()
        self.calls += 1
        if self.calls - 1 in DIVERGED:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return {"loss_good": loss, "loss_box": loss * (math.nan if self.calls - 1 in BAD else 1.0)}


@pytest.fixture
def small(cfg: CfgNode, tiny_coco: tuple[str, str], tmp_path: Path) -> CfgNode:
    BAD.clear()
    DIVERGED.clear()
    register_coco("survival", *tiny_coco)
    cfg.MODEL.META_ARCHITECTURE = "TinyDetector"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("survival",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (16,)
    cfg.SEED, cfg.OUTPUT_DIR = 7, str(tmp_path / "out")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 6, ()
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.WARMUP_ITERS = 2, 0
    cfg.SOLVER.BASE_LR = 0.1
    Path(cfg.OUTPUT_DIR).mkdir()
    return cfg


@pytest.fixture(autouse=True)
def _workers_end_with_their_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the garbage collector finds a loader, PyTorch waits 5 s for each of its workers."""
    loaders: list[Any] = []
    start = _MultiProcessingDataLoaderIter.__init__
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter,
        "__init__",
        lambda self, *args: (loaders.append(self), start(self, *args))[1],
    )
    yield
    for loader in loaders:
        loader._shutdown_workers()


def train(cfg: CfgNode, resume: bool = False, **settings: Any) -> PluginTrainer:
    cfg = cfg.clone()
    cfg.SOLVER.merge_from_other_cfg(CfgNode(settings))
    torch.manual_seed(0)
    trainer = PluginTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights(cfg: CfgNode, name: str = "model_final.pth") -> dict[str, Tensor]:
    return torch.load(Path(cfg.OUTPUT_DIR, name))["model"]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    logger = logging.getLogger("detectron2")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


# ------------------------------------------------------------------------------------------- losses


def test_a_step_whose_loss_is_not_finite_changes_nothing_and_is_told(small, logged):
    BAD.add(3)
    train(small, CHECKPOINT_PERIOD=1)
    assert_same(weights(small, "model_0000002.pth"), weights(small, "model_0000003.pth"))
    assert not torch.equal(
        weights(small)["layer.weight"], weights(small, "model_0000003.pth")["layer.weight"]
    )
    assert all(value.isfinite().all() for value in weights(small).values())
    assert "Step 3 left out: loss_box = nan, loss = nan with the images " in logged()
    assert ".png" in logged() and "1 steps were left out" in logged()


def test_a_step_that_detectron2_stops_itself_is_left_out_too(small, logged):
    DIVERGED.add(3)
    train(small, CHECKPOINT_PERIOD=1)
    assert_same(weights(small, "model_0000002.pth"), weights(small, "model_0000003.pth"))
    assert "Step 3 left out: " in logged() and "(Predicted boxes or scores" in logged()
    DIVERGED.update(range(100))
    with pytest.raises(NonFiniteLoss, match="2 steps in a row"):
        train(small, MAX_NON_FINITE_STEPS=2)


def test_checkpoints_of_an_earlier_training_are_told(small, logged):
    train(small)
    assert "earlier training" not in logged()
    train(small)
    assert "has checkpoints of an earlier training (model_0000001.pth" in logged()


def test_too_many_such_steps_in_a_row_end_the_training_with_a_remedy(small):
    BAD.update(range(3, 100))
    with pytest.raises(NonFiniteLoss) as error:
        train(small, MAX_NON_FINITE_STEPS=2)
    text = str(error.value)
    assert "2 steps in a row (SOLVER.MAX_NON_FINITE_STEPS); in the last loss_box = nan" in text
    assert "last good checkpoint: " in text and "model_0000003.pth" in text
    assert "Lower SOLVER.BASE_LR" in text and "\n" not in text


def test_guarded_steps_are_detectron2s(small):
    def after(kind: type, **arguments: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = TinyDetector(small)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        trainer = kind(model, ResumableTrainLoader(small), optimizer, **arguments)
        trainer.train(0, 4)
        return model.state_dict()

    from plugin_core.training.non_finite import NonFiniteGuard

    guarded = after(GuardedTrainer, guard=NonFiniteGuard(2, "x"), settings={}, remedy="")
    assert_same(guarded, after(SimpleTrainer))


# ------------------------------------------------------------------------------------------- images


@pytest.fixture
def with_bad_image(small: CfgNode, tiny_coco: tuple[str, str], tmp_path: Path) -> Path:
    """The data with a bad image, which is the only high one of its shape."""
    shutil.copytree(tiny_coco[1], tmp_path / "data")
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    register_coco("bad", str(tmp_path / "data" / "annotations.json"), str(tmp_path / "data"))
    small.DATASETS.TRAIN = ("bad",)
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_also_from_a_worker(small, with_bad_image, workers):
    small.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(UnreadableImage) as error:
        train(small)
    text = str(error.value)
    assert text.startswith(f"image {str(with_bad_image / '2.png')!r} cannot be read")
    assert "\n" not in text and "Traceback" not in text


def test_skipped_images_are_told_and_the_resume_is_exact(small, with_bad_image, logged):
    small.INPUT.SKIP_BAD_IMAGES = True
    train(small)
    expected = weights(small)
    assert f"Left out: image {str(with_bad_image / '2.png')!r}" in logged()
    assert "1 unreadable images were left out" in logged()
    for name in ("model_final.pth", "model_0000005.pth"):
        Path(small.OUTPUT_DIR, name).unlink()
    small.DATALOADER.NUM_WORKERS = 1
    train(small, resume=True)
    assert_same(weights(small), expected)


def test_skipping_ends_where_no_image_is_left(small, with_bad_image):
    small.INPUT.SKIP_BAD_IMAGES = True
    for path in with_bad_image.glob("*.png"):
        path.write_bytes(b"")
    for seed in (7, -1):
        small.SEED = seed
        with pytest.raises(UnreadableImage, match="all of 7 images in turn cannot be read"):
            train(small)


def test_another_image_takes_the_place_in_the_batch_that_waits():
    def load(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["file_name"] == "bad":
            raise UnreadableImage("image 'bad' cannot be read")
        return dict(sample)

    samples = [
        {"file_name": "bad", "width": 1, "height": 2},
        {"file_name": "good", "width": 2, "height": 1},
    ]
    given = ReadableDataset(samples, load)[0]
    assert (given["file_name"], given["width"], given["height"]) == ("good", 1, 2)
    assert given["left_out"] == {"bad": "image 'bad' cannot be read"}


def test_an_unreadable_image_is_an_error_in_evaluation_also_where_training_skips(
    small, with_bad_image
):
    small.INPUT.SKIP_BAD_IMAGES = True
    with pytest.raises(UnreadableImage, match=r"2\.png"):
        list(PluginTrainer.build_test_loader(small, "bad"))


# -------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_name_the_classes(small):
    train(small)
    assert class_names_of(str(Path(small.OUTPUT_DIR, "model_final.pth"))) == ["thing"]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_resume_passes_over_a_damaged_checkpoint_and_names_it(small, logged, damage):
    train(small)
    expected = weights(small)
    newest = Path(small.OUTPUT_DIR, "model_final.pth")
    for path in (newest, newest.with_name("model_0000005.pth")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
        if damage == "missing":
            path.unlink()
    assert find_resumable(small.OUTPUT_DIR).endswith("model_0000003.pth")
    trainer = train(small, resume=True)
    assert trainer.start_iter == 4
    assert f"passing over {str(newest)!r}" in logged()
    assert_same(weights(small), expected)


def test_a_folder_without_a_whole_checkpoint_is_one_clear_line(small):
    Path(small.OUTPUT_DIR, "model_0000001.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="^--resume: no checkpoint in .* is whole: .*0000001.pth"):
        find_resumable(small.OUTPUT_DIR)


class Remote(PathHandler):
    """A folder under an address."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return ["remote://"]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return str(self.folder / path.removeprefix("remote://"))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self._get_local_path(path), mode)

    def _exists(self, path: str, **_: Any) -> bool:
        return Path(self._get_local_path(path)).exists()

    def _isfile(self, path: str, **_: Any) -> bool:
        return Path(self._get_local_path(path)).is_file()


def test_a_remote_folder_is_resumed_as_detectron2_does(tmp_path):
    saved, read = (PluginCheckpointer(nn.Linear(2, 2), "remote://") for _ in range(2))
    for checkpointer in (saved, read):
        checkpointer.path_manager = PathManager()
        checkpointer.path_manager.register_handler(Remote(tmp_path))
    saved.save("model_0000001", iteration=1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert read.resume_or_load("", resume=True)["iteration"] == 1 and read.resumed
    assert torch.equal(read.model.weight, saved.model.weight)


def test_nothing_to_resume_is_told(small, logged):
    assert train(small, resume=True).start_iter == 0
    assert f"there is no checkpoint in {small.OUTPUT_DIR!r}; beginning anew" in logged()


def test_a_moved_folder_goes_on_from_its_own_checkpoint(small, tmp_path):
    train(small)
    expected = weights(small)
    moved = tmp_path / "moved"
    shutil.move(small.OUTPUT_DIR, moved)
    (moved / "model_final.pth").unlink()
    (moved / "last_checkpoint").write_text("model_0000003.pth")
    small.OUTPUT_DIR = str(moved)
    assert train(small, resume=True).start_iter == 4
    assert_same(weights(small), expected)


def test_a_training_that_was_killed_before_its_final_checkpoint_gets_it_when_resumed(small):
    train(small)
    expected = weights(small)
    Path(small.OUTPUT_DIR, "model_final.pth").unlink()
    assert train(small, resume=True).start_iter == 6
    assert_same(weights(small), expected)
    assert Path(small.OUTPUT_DIR, "last_checkpoint").read_text() == "model_final.pth"
    assert train(small, resume=True).start_iter == 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(small, monkeypatch, error):
    trainer = train(small)
    folder = Path(small.OUTPUT_DIR)
    before = {p.name: p.read_bytes() for p in folder.glob("*") if p.suffix != ".json"}

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ValueError, match=r"cannot be written: .* last good checkpoint: .*final"):
        trainer.checkpointer.save("model_final")
    assert {p.name: p.read_bytes() for p in folder.glob("*") if p.suffix != ".json"} == before


# ----------------------------------------------------------------------------------------- settings


def test_new_settings_hold_from_the_resumed_iteration_and_are_told(small, logged):
    train(small)
    for name in ("model_final.pth", "model_0000005.pth"):
        Path(small.OUTPUT_DIR, name).unlink()
    trainer = train(
        small, resume=True, BASE_LR=0.5, WEIGHT_DECAY=0.25, STEPS=(5,), WEIGHT_DECAY_NORM=0.125
    )
    text = logged()
    assert "Resumed at iteration 4 with other settings" in text
    assert "SOLVER.BASE_LR 0.1 -> 0.5" in text and "SOLVER.STEPS [] -> [5]" in text
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.25, 0.125}
    assert {group["lr"] for group in groups} == {0.05}
    lines = Path(small.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["lr"] == pytest.approx(0.05)


def test_a_resumed_training_without_new_settings_is_exact_and_says_nothing(small, logged):
    train(small)
    expected = weights(small)
    for name in ("model_final.pth", "model_0000005.pth"):
        Path(small.OUTPUT_DIR, name).unlink()
    train(small, resume=True)
    assert_same(weights(small), expected)
    assert "other settings" not in logged()


# ------------------------------------------------------------------------------------------ weights


class Detector(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, classes)


@pytest.mark.parametrize("prefix", ["module.", "model.", "ema_", "ema_model.module."])
@pytest.mark.parametrize("nested", ["model", "state_dict", None])
def test_weights_with_a_prefix_in_half_precision_are_loaded(tmp_path, prefix, nested):
    first, second = Detector(), Detector()
    state = {f"{prefix}{name}": value.half() for name, value in first.state_dict().items()}
    torch.save({nested: state, "epoch": 3} if nested else {**state, "epoch": 3}, tmp_path / "w.pth")
    PluginCheckpointer(second).load(str(tmp_path / "w.pth"))
    expected = {name: value.half().float() for name, value in first.state_dict().items()}
    assert_same(second.state_dict(), expected)


def test_another_number_of_classes_is_an_error_only_where_nothing_trains(tmp_path):
    path = str(tmp_path / "w.pth")
    torch.save({"model": Detector(5).state_dict()}, path)
    check_weights(Detector(), path, "MODEL.WEIGHTS", whole=False)
    with pytest.raises(ValueError) as error:
        check_weights(Detector(), path, "MODEL.WEIGHTS", whole=True)
    assert "head.weight ((5, 4) in the file, (3, 4) in the model)" in str(error.value)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_which_none_fits_are_refused(tmp_path, whole):
    path = str(tmp_path / "w.pth")
    torch.save({"model": {"other.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"^MODEL\.WEIGHTS: no tensor .* 'other\.weight'"):
        check_weights(Detector(), path, "MODEL.WEIGHTS", whole=whole)


def test_weights_of_two_models_are_refused(tmp_path):
    path = str(tmp_path / "w.pth")
    state = Detector().state_dict()
    torch.save({"model": {f"{p}.{n}": state[n] for p in "st" for n in state}}, path)
    with pytest.raises(ValueError, match=r"^MODEL\.WEIGHTS: .* prefixes 's\.', 't\.'"):
        check_weights(Detector(), path, "MODEL.WEIGHTS", whole=False)


# ------------------------------------------------------------------------------------- command line


class Arguments:
    eval_only, resume, machine_rank, num_gpus, num_machines = False, False, 0, 1, 1


def test_mixed_precision_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"^SOLVER\.AMP\.ENABLED: mixed precision needs a GPU"):
        check_amp(Arguments, "SOLVER.AMP.ENABLED", True, "cpu")
    check_amp(Arguments, "SOLVER.AMP.ENABLED", True, "cuda")


@pytest.mark.parametrize("error", [UnreadableImage("image 'a'"), OSError(28, "No space left")])
def test_an_expected_error_ends_a_run_in_a_line(small, error):
    def main(args: Any, cfg: Any) -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run(Arguments, lambda args: small, main)
    assert str(end.value) == f"error: {error}"


def test_an_unexpected_error_keeps_its_traceback(small):
    def main(args: Any, cfg: Any) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(Arguments, lambda args: small, main)
