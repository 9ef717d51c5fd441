"""PEP 517 backend that packs the Python part of Detectron2 v0.6 as a wheel.

The package index has no ``detectron2``. It has ``pb1-detectron2``, a source archive with
Detectron2's Python files and model zoo configs. pip refuses this archive, as its metadata names a
direct URL, and its setup.py needs C++ sources that are missing. So this backend fetches the
archive, checks its hash, repairs it for newer NumPy, Pillow and PyTorch (see ``FIXES``), puts a
stub in place of the compiled ops, and packs ``detectron2==0.6+py``.

Environment variables:
    PIP_INDEX_URL, UV_DEFAULT_INDEX, UV_INDEX_URL: the package index to ask, as for pip and uv.
    PIP_CERT: certificates to trust, as for pip.
    DETECTRON2_SDIST: path of an archive downloaded earlier; nothing is fetched then.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = "pb1-detectron2"
SDIST = "pb1-detectron2-0.6.tar.gz"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")

# Small projects that upstream's setup.py installs as detectron2.projects.<name>.
PROJECTS = {
    "point_rend": "projects/PointRend/point_rend",
    "deeplab": "projects/DeepLab/deeplab",
    "panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "0.6+py"
description = "Detectron2 v0.6 without compiled ops, repaired for current NumPy, Pillow and PyTorch"
license = "Apache-2.0"
license-files = ["LICENSE", "NOTICE"]
authors = [{ name = "FAIR" }]
requires-python = ">=3.8"
# As upstream's, but without black (a formatter, pinned to one old version), future and pydot
# (both for Caffe2, which is gone), with iopath bounded only by the next minor series, and with
# OpenCV, which upstream leaves to the user and the visualizer does not import without.
dependencies = [
  "Pillow>=7.1",
  "matplotlib",
  "opencv-python",
  "pycocotools>=2.0.2",
  "termcolor>=1.1",
  "yacs>=0.1.8",
  "tabulate",
  "cloudpickle",
  "tqdm>4.29.0",
  "tensorboard",
  "fvcore>=0.1.5,<0.1.6",
  "iopath>=0.1.7,<0.2",
  "omegaconf>=2.1",
  "hydra-core>=1.1",
  "numpy",
  "setuptools<81",  # model_zoo imports pkg_resources
]

[tool.setuptools]
include-package-data = false

[tool.setuptools.packages.find]
include = ["detectron2", "detectron2.*"]
namespaces = false

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""

OPS_STUB = '''\
"""Stands in for Detectron2's compiled ops, which this installation does not have.

Modules import this name when they are imported, so the import succeeds; using an op does not.
"""


def get_compiler_version():
    return "none: installed without compiled ops"


def get_cuda_version():
    return "none: installed without compiled ops"


def has_cuda():
    return False


def __getattr__(name):
    # No op starts with an underscore, but what the interpreter, inspect, pickle and
    # torch.compile look for does, and they expect an AttributeError.
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise ImportError(
        f"detectron2._C.{name}: this Detectron2 was installed without compiled ops "
        "(deformable convolutions, rotated boxes and the fast COCO evaluator need them). "
        "Install Detectron2 as its own installation guide says."
    )
'''


class BuildError(Exception):
    """The wheel cannot be built; the message says why and what to do."""


class Fix(NamedTuple):
    """One replacement in one file of the source.

    Attributes:
        path: the file, relative to the root of the source.
        pattern: regular expression to search for.
        replacement: as for ``re.sub``.
        count: how often the pattern must match.
        reason: what was wrong, for the NOTICE.
    """

    path: str
    pattern: str
    replacement: str
    count: int
    reason: str


def _numpy_alias(path: str, count: int) -> Fix:
    return Fix(
        f"detectron2/{path}",
        r"\bnp\.(bool|float|int|str)\b",
        r"\1",
        count,
        "NumPy 1.24 removed its aliases of the builtin types",
    )


FIXES = (
    _numpy_alias("data/build.py", 2),
    _numpy_alias("data/datasets/pascal_voc.py", 1),
    _numpy_alias("evaluation/pascal_voc_evaluation.py", 2),
    _numpy_alias("evaluation/sem_seg_evaluation.py", 7),
    _numpy_alias("structures/masks.py", 3),
    _numpy_alias("utils/video_visualizer.py", 1),
    _numpy_alias("utils/visualizer.py", 3),
    Fix(
        "detectron2/data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        1,
        "Pillow 10 removed Image.LINEAR",
    ),
    Fix(
        "detectron2/evaluation/fast_eval_api.py",
        r"\Z",
        "\n\nCOCOeval_opt = COCOeval  # without compiled ops: the same results, slower\n",
        1,
        "without compiled ops, COCOeval_opt is pycocotools' COCOeval",
    ),
    Fix(
        "detectron2/export/__init__.py",
        r"(?m)^from \.api import \*$",
        "try:\n    from .api import *\nexcept ImportError:  # no Caffe2\n    pass",
        1,
        "PyTorch no longer holds Caffe2; its export is left out instead of failing the import",
    ),
    Fix(
        "detectron2/engine/launch.py",
        r'(?m)^    assert torch\.cuda\.is_available\(\), "cuda is not available.*$',
        "    has_gpu = torch.cuda.is_available()",
        1,
        "several processes on a machine without a GPU, as in upstream's later versions",
    ),
    Fix(
        "detectron2/engine/launch.py",
        r'backend="NCCL"',
        'backend="NCCL" if has_gpu else "GLOO"',
        1,
        "several processes on a machine without a GPU, as in upstream's later versions",
    ),
    Fix(
        "detectron2/engine/launch.py",
        r"(?m)^    (assert num_gpus_per_machine <= .*)\n    (torch\.cuda\.set_device.*)$",
        r"    if has_gpu:\n        \1\n        \2",
        1,
        "several processes on a machine without a GPU, as in upstream's later versions",
    ),
    Fix(
        "detectron2/engine/defaults.py",
        r'kwargs\["device_ids"\] = \[comm\.get_local_rank\(\)\]',
        r"\g<0> if torch.cuda.is_available() else None",
        1,
        "DistributedDataParallel takes no device_ids for a model on the CPU",
    ),
)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build ``detectron2-0.6+py-py3-none-any.whl`` (PEP 517).

    Args:
        wheel_directory: where the wheel is written.
        config_settings: not used.
        metadata_directory: not used.

    Returns:
        The wheel's file name.

    Raises:
        BuildError: if the archive cannot be had or is not the one expected.
    """
    wheel_directory = os.path.abspath(wheel_directory)
    with tempfile.TemporaryDirectory(prefix="detectron2-") as scratch:
        archive = Path(os.environ.get("DETECTRON2_SDIST") or fetch_sdist(Path(scratch)))
        source = unpack(archive, Path(scratch) / "source")
        prepare(source)
        return _pack(source, wheel_directory)


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Refuse (PEP 517 demands the hook): a source archive would republish Detectron2."""
    raise BuildError(
        "detectron2: no source archive is made of this folder, since it holds nothing of "
        f"Detectron2; build a wheel, or take the {PROJECT} source archive from the package index"
    )


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Refuse (PEP 660): there is no source here to edit."""
    raise BuildError(
        "detectron2: this folder holds no source to edit; install it without -e/--editable"
    )


def fetch_sdist(folder: Path) -> Path:
    """Download the source archive from the package index.

    Args:
        folder: where the archive is written.

    Returns:
        The archive's path.

    Raises:
        BuildError: if the index does not have it or cannot be reached.
    """
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

    variable = next((name for name in INDEX_VARIABLES if os.environ.get(name)), None)
    endpoint = os.environ[variable] if variable else PYPI_SIMPLE_ENDPOINT
    offline_hint = f"or set DETECTRON2_SDIST to the path of a downloaded {SDIST}"
    if not endpoint.startswith(("http://", "https://")):
        raise BuildError(
            f"{variable}={endpoint}: only an http(s) package index can be asked for {PROJECT}; "
            f"set it to one, {offline_hint}"
        )
    session = requests.Session()
    session.mount("https://", requests.adapters.HTTPAdapter(max_retries=5))
    session.mount("http://", requests.adapters.HTTPAdapter(max_retries=5))
    if os.environ.get("PIP_CERT"):
        session.verify = os.environ["PIP_CERT"]
    try:
        with PyPISimple(endpoint, session=session) as client:
            for package in client.get_project_page(PROJECT).packages:
                if package.filename == SDIST:
                    client.download_package(package, folder / SDIST)
                    return folder / SDIST
    except Exception as error:  # of requests, pypi_simple or the file system: all end here
        reason = re.sub(r"//[^/@\s]*@", "//", str(error))  # without a password in an address
        raise BuildError(
            f"{SDIST} could not be downloaded from {variable or 'the package index'}: {reason}; "
            f"check the network, {offline_hint}"
        ) from error
    raise BuildError(
        f"{SDIST} is not on {variable or 'the package index'}; "
        f"name one that has {PROJECT} with {INDEX_VARIABLES[0]}, {offline_hint}"
    )


def unpack(archive: Path, destination: Path, sha256: str = SDIST_SHA256) -> Path:
    """Check the archive's hash and unpack it.

    Args:
        archive: path of the .tar.gz.
        destination: a folder that does not exist yet.
        sha256: the hash that the archive must have.

    Returns:
        The root of the source, the archive's only top folder.

    Raises:
        BuildError: if the archive is missing or is another one than expected.
    """
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise BuildError(f"{archive}: cannot be read ({error.strerror})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BuildError(f"{archive.name}: sha256 is {found}, expected {sha256}; not used")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        # The filter came with Python 3.12 and with security releases of older versions. Without it,
        # only the checked hash vouches for the archive.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(destination, **safely)
    (root,) = destination.iterdir()
    return root


def prepare(source: Path) -> None:
    """Turn the unpacked archive into a source tree that setuptools packs as it is."""
    apply_fixes(source, FIXES)
    (source / "detectron2" / "_C.py").write_text(OPS_STUB, encoding="utf-8")
    for name, folder in PROJECTS.items():
        shutil.move(str(source / folder), str(source / "detectron2" / "projects" / name))
    for name in ("setup.py", "setup.cfg"):
        (source / name).unlink()
    (source / "NOTICE").write_text(notice(FIXES), encoding="utf-8")
    (source / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")


def apply_fixes(source: Path, fixes: tuple[Fix, ...]) -> None:
    """Apply every fix. Each must match exactly as often as its ``count``.

    Args:
        source: root of the source.
        fixes: what to replace.

    Raises:
        BuildError: naming the file and the pattern, if a file is missing or a pattern matches
            more or less often than expected.
    """
    for fix in fixes:
        file = source / fix.path
        if not file.is_file():
            raise BuildError(f"{fix.path}: not in the source; a fix for {fix.pattern!r} needs it")
        text, count = re.subn(fix.pattern, fix.replacement, file.read_text(encoding="utf-8"))
        if count != fix.count:
            raise BuildError(
                f"{fix.path}: pattern {fix.pattern!r} matched {count} times, expected {fix.count}"
            )
        file.write_text(text, encoding="utf-8")


def notice(fixes: tuple[Fix, ...]) -> str:
    """Return the NOTICE for the wheel: the differences from upstream."""
    lines = [
        "Detectron2, Copyright (c) Facebook, Inc. and its affiliates, Apache License 2.0.",
        "",
        "This wheel holds the Python files of Detectron2 v0.6 with these changes:",
        "",
        "- detectron2/_C.py: added; the compiled ops are left out, using one raises ImportError",
        "- requirements: black, future and pydot dropped; opencv-python, numpy and setuptools<81",
        "  added; iopath<0.2 instead of <0.1.10",
        *(f"- {fix.path}: {fix.reason} ({fix.count} places)" for fix in fixes),
        "",
    ]
    return "\n".join(lines)


def _pack(source: Path, wheel_directory: str) -> str:
    """Run setuptools' own backend in ``source``."""
    from setuptools import build_meta

    folder, arguments = os.getcwd(), sys.argv
    os.chdir(source)
    try:
        sys.argv = [*arguments[:1]]
        return build_meta.build_wheel(wheel_directory)
    finally:
        sys.argv = arguments
        os.chdir(folder)
