"""Which framework each package imports, and what it says where that one is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ("detectron2", "mmdet", "mmengine", "mmcv")
OTHERS = (*FRAMEWORKS, "torchvision", "timm", "d2_plugins", "mm_plugins")
# Drawing is for tools: no training imports it.
PICTURES = ("plugin_core.inspection.sheets", "pytorch_grad_cam")


def python(code: str) -> str:
    """Output of ``code``, run by a fresh interpreter that finds the packages of this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def imported_by(package: str) -> set[str]:
    names = (*OTHERS, *PICTURES)
    code = f"import {package}, sys; print(*[m for m in {names} if m in sys.modules])"
    return set(python(code).split())


def error_without(package: str, *missing: str) -> str:
    return python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        f"try: import {package}\n"
        "except ImportError as error: print(error)"
    )


def modules_of(package: str) -> str:
    """All modules of a package, as an import statement names them."""
    names = [
        file.relative_to(ROOT).with_suffix("").parts for file in (ROOT / package).rglob("*.py")
    ]
    return ", ".join(".".join(parts).removesuffix(".__init__") for parts in names)


def needs(framework: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f"{framework} is not installed")


def test_plugin_core_imports_no_framework():
    assert not imported_by(modules_of("plugin_core")) & set(OTHERS)


@needs("detectron2")
def test_d2_plugins_imports_nothing_of_mmdetection():
    imported = imported_by(modules_of("d2_plugins"))
    assert "detectron2" in imported
    assert not imported & {"mmdet", "mmengine", "mmcv", "mm_plugins", *PICTURES}


@needs("mmdet")
def test_mm_plugins_works_without_detectron2():
    # MMDetection imports Detectron2 itself where there is one, so it is taken away.
    missing = ("detectron2", "d2_plugins", *PICTURES)
    assert error_without(modules_of("mm_plugins"), *missing) == ""


def test_missing_detectron2_is_an_error_that_says_what_to_install():
    message = error_without("d2_plugins", "detectron2")
    assert "d2_plugins needs Detectron2" in message
    assert "pip install ./packaging/detectron2" in message


@pytest.mark.parametrize("missing", ["mmdet", "mmengine", "mmcv"])
def test_missing_mmdetection_is_an_error_that_says_what_to_install(missing):
    message = error_without("mm_plugins", missing)
    assert "mm_plugins needs MMDetection" in message
    assert "pip install -e .[mmdet]" in message
