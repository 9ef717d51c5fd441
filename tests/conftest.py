"""Where the tests find real images, and what keeps them quick on a small machine."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import quick_frameworks
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # the tools import one another as a script does

torch.set_num_threads(1)  # tests run side by side
gc.disable()  # until all is imported, which leaves little behind
quick_frameworks.read_once()
# Nothing is downloaded; without it, a text model that is missing is looked for on a network first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported lives to the end: collections need not look at it each time
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _quick_models() -> None:
    quick_frameworks.draw_little()


@pytest.fixture
def whole_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """For outputs of random weights that would be too much alike if parts of these repeated."""
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, getattr(torch.Tensor, name).__wrapped__)


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("PLUGIN_KERNELS", raising=False)  # tests choose for themselves


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep results of data checks out of the user's cache, for tools that tests start, too."""
    os.environ["DETECTION_PLUGINS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def coco_sample() -> Path:
    """A folder of 33 real images in the layout of COCO 2017."""
    folder = Path(os.environ.get("COCO_SAMPLE_DIR", ROOT.parent / "shared" / "coco_sample"))
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no COCO sample in {folder}; set COCO_SAMPLE_DIR to a folder that has one")
    return folder


@pytest.fixture(scope="session")
def drawn_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six train and three val images of 64 pixels in COCO 2017's layout, with all labels."""
    from make_synthetic_coco import make_dataset

    folder = tmp_path_factory.mktemp("drawn") / "coco"
    make_dataset(folder, train=6, val=3, size=64, seed=2, progress=False)
    return folder
