"""A wheel made from the source distribution, in an environment that has no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from plugin_core import __version__
from plugin_core.command_line import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("plugin_core", "d2_plugins", "mm_plugins", "configs", "tools")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
#: Without what this process adds to the path, as it would find the checkout
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def run(*words: object, cwd: Path) -> str:
    result = subprocess.run(
        [str(w) for w in words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True
    )
    if result.returncode:
        pytest.fail(f"{words} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=folder)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", folder, sdist, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment ``venv`` that has the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("outside")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    # Path files there are not read again, so that an editable installation is not found.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = ("install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    return folder


def test_it_holds_every_config_and_every_command(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as built:
        installed = set(built.namelist())
    places = {"d2": "d2_plugins/configs", "mm": "mm_plugins/.mim/configs"}
    places["mmpretrain"] = "mm_plugins/.mim/configs/mmpretrain"
    expected = {f"plugin_core/tools/{script}" for script in COMMANDS.values()}
    expected |= {"plugin_core/tools/synthetic_coco/__init__.py", "mm_plugins/.mim/model-index.yml"}
    for side, place in places.items():
        folder = ROOT / "configs" / side
        files = [p.relative_to(folder) for p in folder.glob("*/*") if p.suffix != ".pyc"]
        expected |= {f"{place}/{file}" for file in files if file.suffix in (".py", ".yaml")}
    assert expected - installed == set()
    assert expected - packed == set()
    assert f"detection_plugins-{__version__}.dist-info/METADATA" in installed


def test_every_mmdetection_config_has_its_link() -> None:
    linked = {path.name for path in (ROOT / "mm_plugins/.mim/configs").iterdir()}
    assert linked == {"mmpretrain", *(p.name for p in (ROOT / "configs/mm").iterdir())}


def test_commands_and_configs_work_outside_the_checkout(outside: Path) -> None:
    command = outside / "venv" / "bin" / "detection-plugins"
    assert run(command, "--version", cwd=outside) == f"detection-plugins {__version__}\n"
    (outside / "mine.py").write_text(
        '_base_ = "mm_plugins::block_plugins/faster-rcnn_r50-eca_fpn_1x_coco.py"\n'
    )
    (outside / "mine.yaml").write_text(
        '_BASE_: "d2_plugins://COCO-Detection/retinanet_R_50_triplet_FPN_1x.yaml"\n'
    )
    check = (
        "import sys, plugin_core; "
        "from d2_plugins.analysis import load_config; "
        "from mm_plugins.analysis import load_config as load_mm; "
        "from plugin_core.kernels.library import library; "
        "assert plugin_core.__file__.startswith(sys.prefix), plugin_core.__file__; "
        "assert library() is not None; "
        "plugin = load_mm('mine.py').model.backbone.plugins[0]; "
        "print(plugin.cfg.name, load_config('mine.yaml').MODEL.RESNETS.PLUGINS[0]['NAME'])"
    )
    python = outside / "venv" / "bin" / "python"
    assert run(python, "-c", check, cwd=outside).split() == ["timm:eca", "triplet_attention"]
