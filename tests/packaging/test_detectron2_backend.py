"""The in-tree build backend of packaging/detectron2, on small trees made here."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_under_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


backend = load(ROOT / "packaging" / "detectron2" / "backend.py")


@pytest.fixture
def stub(tmp_path: Path) -> types.ModuleType:
    path = tmp_path / "_C.py"
    path.write_text(backend.OPS_STUB)
    return load(path)


def write(root: Path, path: str, text: str) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def archive(path: Path, members: dict[str, str]) -> str:
    """Write a .tar.gz and return its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fix_replaces_every_match(tmp_path: Path) -> None:
    file = write(tmp_path, "a.py", "x = np.bool\ny = np.bool_\nz = np.float32(np.float(1))\n")
    fix = backend.Fix("a.py", r"\bnp\.(bool|float|int|str)\b", r"\1", 2, "aliases")
    backend.apply_fixes(tmp_path, (fix,))
    assert file.read_text() == "x = bool\ny = np.bool_\nz = np.float32(float(1))\n"


@pytest.mark.parametrize("text", ["nothing here", "np.bool, np.bool"])
def test_fix_that_matches_another_number_of_times_names_file_and_pattern(
    tmp_path: Path, text: str
) -> None:
    write(tmp_path, "pkg/a.py", text)
    with pytest.raises(backend.BuildError, match=r"pkg/a\.py: pattern 'np\.bool' .* expected 1"):
        backend.apply_fixes(tmp_path, (backend.Fix("pkg/a.py", "np.bool", "bool", 1, "why"),))


def test_fix_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(backend.BuildError, match=r"pkg/gone\.py: not in the source"):
        backend.apply_fixes(tmp_path, (backend.Fix("pkg/gone.py", "a", "b", 1, "why"),))


def test_prepare_adds_stub_notice_and_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix = backend.Fix("detectron2/a.py", "Image.LINEAR", "Image.BILINEAR", 1, "it was removed")
    monkeypatch.setattr(backend, "FIXES", (fix,))
    write(tmp_path, "detectron2/a.py", "Image.LINEAR")
    write(tmp_path, "detectron2/projects/__init__.py", "")
    for folder in backend.PROJECTS.values():
        write(tmp_path, f"{folder}/__init__.py", "")
    for name in ("setup.py", "setup.cfg"):
        write(tmp_path, name, "raise SystemExit('must not run')")
    backend.prepare(tmp_path)
    assert (tmp_path / "detectron2/a.py").read_text() == "Image.BILINEAR"
    assert (tmp_path / "detectron2/_C.py").is_file()
    assert (tmp_path / "detectron2/projects/point_rend/__init__.py").is_file()
    assert "detectron2/a.py: it was removed" in (tmp_path / "NOTICE").read_text()
    assert not (tmp_path / "setup.py").exists()
    assert 'version = "0.6+py"' in (tmp_path / "pyproject.toml").read_text()


def test_eval_and_export_fixes_do_what_they_say() -> None:
    by_path = {fix.path: fix for fix in backend.FIXES}
    evaluation = by_path["detectron2/evaluation/fast_eval_api.py"]
    export = by_path["detectron2/export/__init__.py"]
    source = "class COCOeval: ...\nclass COCOeval_opt(COCOeval): ...\n"
    namespace: dict[str, type] = {}
    exec(re.sub(evaluation.pattern, evaluation.replacement, source), namespace)
    assert namespace["COCOeval_opt"] is namespace["COCOeval"]
    text = re.sub(
        export.pattern, export.replacement, "from .api import *\nfrom .flatten import A\n"
    )
    compile(text, "export", "exec")
    assert "except ImportError" in text


def test_unpack_returns_the_top_folder(tmp_path: Path) -> None:
    sha256 = archive(tmp_path / "s.tar.gz", {"top/a.txt": "a"})
    root = backend.unpack(tmp_path / "s.tar.gz", tmp_path / "out", sha256)
    assert root == tmp_path / "out" / "top"
    assert (root / "a.txt").read_text() == "a"


def test_unpack_refuses_another_archive(tmp_path: Path) -> None:
    archive(tmp_path / "s.tar.gz", {"top/a.txt": "a"})
    with pytest.raises(backend.BuildError, match=r"s\.tar\.gz: sha256 is .*, expected 5d2e9e51"):
        backend.unpack(tmp_path / "s.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no tar filters")
def test_unpack_writes_nothing_outside(tmp_path: Path) -> None:
    sha256 = archive(tmp_path / "s.tar.gz", {"top/../../evil.txt": "a"})
    with pytest.raises(tarfile.OutsideDestinationError):
        backend.unpack(tmp_path / "s.tar.gz", tmp_path / "deep" / "out", sha256)
    assert not (tmp_path / "deep" / "evil.txt").exists()


def test_missing_local_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_SDIST", str(tmp_path / "gone.tar.gz"))
    with pytest.raises(backend.BuildError, match=r"gone\.tar\.gz: cannot be read"):
        backend.build_wheel(str(tmp_path))


@pytest.mark.parametrize("hook", [backend.build_sdist, backend.build_editable])
def test_source_archive_and_editable_install_are_refused(tmp_path: Path, hook: object) -> None:
    assert callable(hook)
    with pytest.raises(backend.BuildError, match="source"):
        hook(str(tmp_path))


def test_stub_op_raises_an_import_error_that_says_what_to_do(stub: types.ModuleType) -> None:
    with pytest.raises(ImportError, match=r"_C\.nms_rotated.*without compiled ops.*Install"):
        _ = stub.nms_rotated


def test_stub_has_no_dunder_or_private_attributes(stub: types.ModuleType) -> None:
    assert not hasattr(stub, "__wrapped__")
    assert not hasattr(stub, "_is_compiled")
    assert inspect.getmembers(stub)
    with pytest.raises(TypeError):  # as any module; not an ImportError
        copy.deepcopy(stub)


def test_stub_answers_what_collect_env_asks(stub: types.ModuleType) -> None:
    assert "without compiled ops" in stub.get_compiler_version()
    assert "without compiled ops" in stub.get_cuda_version()
    assert stub.has_cuda() is False


def installed_detectron2() -> str:
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@pytest.mark.skipif(
    not installed_detectron2().endswith("+py"),
    reason=f"Detectron2 is not the wheel of packaging/detectron2 ({installed_detectron2()})",
)
def test_installed_wheel_works() -> None:
    code = """
import os
from detectron2 import _C, model_zoo
import detectron2.engine, detectron2.evaluation, detectron2.export
import detectron2.projects.point_rend, detectron2.projects.deeplab
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.cocoeval import COCOeval
assert COCOeval_opt is COCOeval
assert os.path.isfile(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
assert os.path.isfile(model_zoo.get_config_file("common/models/mask_rcnn_fpn.py"))
try:
    _C.deform_conv_forward
except ImportError as error:
    assert "without compiled ops" in str(error)
else:
    raise AssertionError("no ImportError")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
