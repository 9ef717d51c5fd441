"""What the tests of MMDetection's side share: its scope, in which the layers are looked up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope

import mm_plugins  # noqa: F401  # registers the plugins


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    register_all_modules(init_default_scope=False)


@pytest.fixture(autouse=True)
def _mmdet_scope(_registered: None) -> Iterator[None]:
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield
