"""What the tests of MMDetection's side share: its scope, in which the layers are looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.utils import register_all_modules
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope

import mm_plugins  # noqa: F401  # registers the plugins


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    register_all_modules(init_default_scope=False)


@pytest.fixture(autouse=True)
def _mmdet_scope(_registered: None) -> Iterator[None]:
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture
def no_iteration_of_another_test() -> Iterator[None]:
    """A detector counts its steps itself until a test says which one it is in."""
    hub = MessageHub.get_current_instance()
    hub.runtime_info.pop("iter", None)
    yield
    hub.runtime_info.pop("iter", None)


@pytest.fixture(scope="session")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small text models by the detector that reads with it."""
    from grounding_detectors import write_text_model

    folder = tmp_path_factory.mktemp("text")
    glip = ("--hidden-size", "768", "--heads", "12", "--layers", "1")
    return {
        "grounding-dino": write_text_model(folder / "small"),
        "glip": write_text_model(folder / "wide", *glip),
    }


@pytest.fixture
def config(text_models: dict[str, Path]) -> Callable[[str], Any]:
    """Gives the config of a small detector by its name."""
    from grounding_detectors import model_config

    return lambda name: model_config(name, text_models.get(name))
