"""What `make setup` checks, compares and decides; nothing is installed here."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup_environment.py"
sys.path.insert(0, str(SCRIPT.parent))  # where a script finds the modules beside it
spec = importlib.util.spec_from_file_location("_setup_environment_under_test", SCRIPT)
assert spec is not None and spec.loader is not None
setup_environment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_environment)
SetupError = setup_environment.SetupError


def is_one_sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".") and ". " not in text


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18), (3, 13, 0), (4, 0, 0)])
def test_wrong_python_is_one_sentence(version: tuple[int, ...]) -> None:
    problem = setup_environment.check_python(version)
    assert is_one_sentence(problem)
    assert "3.10 to 3.12" in problem and f"this is {version[0]}.{version[1]}" in problem


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 9)])
def test_supported_python_passes(version: tuple[int, ...]) -> None:
    assert setup_environment.check_python(version) is None


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-c++ -O2")
    problem = setup_environment.check_compiler(find=lambda name: None)
    assert is_one_sentence(problem) and "my-c++" in problem
    asked: list[str] = []
    assert setup_environment.check_compiler(find=lambda n: asked.append(n) or n) is None
    assert asked == ["my-c++"]


def test_missing_header_is_one_sentence(tmp_path: Path) -> None:
    problem = setup_environment.check_headers(str(tmp_path))
    assert is_one_sentence(problem) and str(tmp_path) in problem
    (tmp_path / "Python.h").touch()
    assert setup_environment.check_headers(str(tmp_path)) is None


def test_missing_venv_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    problem = setup_environment.check_venv()
    assert is_one_sentence(problem) and "ensurepip" in problem


def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    problem = setup_environment.check_disk(tmp_path, free_bytes=3_000_000_000)
    assert is_one_sentence(problem) and "12 GB" in problem and "3.0 GB" in problem
    assert setup_environment.check_disk(tmp_path, free_bytes=12_000_000_000) is None


def test_script_can_be_read_by_old_pythons() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_constraints_are_read_for_the_running_python() -> None:
    text = """
# a comment
Torch==2.11.0
ruamel_yaml==1.0  # why
numpy==2.4.6; python_version >= "3.11"
numpy==2.2.6; python_version < "3.11"
"""
    new = setup_environment.read_constraints(text, (3, 11))
    assert new == {"torch": "2.11.0", "ruamel-yaml": "1.0", "numpy": "2.4.6"}
    assert setup_environment.read_constraints(text, (3, 10))["numpy"] == "2.2.6"


@pytest.mark.parametrize("line", ["torch>=2.1", "torch", "torch==2.*", "torch @ file:x.whl"])
def test_constraint_that_is_no_pin_is_refused(line: str) -> None:
    with pytest.raises(SetupError, match="line 2: .* is no exact pin"):
        setup_environment.read_constraints(f"numpy==2.0\n{line}\n", (3, 11))


def test_marker_that_is_not_understood_is_refused() -> None:
    with pytest.raises(SetupError, match="marker .* is not understood"):
        setup_environment.read_constraints('a==1; sys_platform == "linux"', (3, 11))


def test_changed_pin_is_the_only_one_listed() -> None:
    pins = {"a": "1.0", "b": "2.0", "torch": "2.11.0", "elsewhere": "1"}
    installed = {"a": "1.0", "b": "1.9", "torch": "2.11.0+cpu", "unpinned": "3"}
    changes = setup_environment.changed_pins(pins, installed)
    assert [str(change) for change in changes] == ["b 1.9 -> 2.0"]


def test_wanted_package_that_is_missing_is_listed() -> None:
    changes = setup_environment.changed_pins({"a": "1.0", "b": "2.0"}, {}, wanted=["b"])
    assert [tuple(change) for change in changes] == [("b", None, "2.0")]


def test_wanted_package_without_pin_is_an_error() -> None:
    with pytest.raises(SetupError, match=r"constraints\.txt has no pin of b"):
        setup_environment.changed_pins({"a": "1.0"}, {"a": "1.0"}, wanted=["b"])


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)])
def test_every_package_of_the_extras_is_pinned(version: tuple[int, int]) -> None:
    pins = setup_environment.read_constraints((ROOT / "constraints.txt").read_text(), version)
    extras = setup_environment.read_extras((ROOT / "setup.py").read_text())
    named = set(setup_environment.direct_requirements(extras)) | {"torch", "numpy", "pip"}
    assert named <= set(pins)
    assert named >= {"mmdet", "mmcv", "fvcore", "pytest", "ruff"}
    assert "detectron2" not in named, "pip would look for it on the package index"


def test_interrupted_package_counts_as_missing(tmp_path: Path) -> None:
    for name, files in {"whole": ("METADATA", "RECORD"), "half": ("METADATA",)}.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        for file in files:
            (folder / file).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    setup_environment.remove_partial(tmp_path)
    assert setup_environment.installed_versions(tmp_path) == {"whole": "1.0"}


def test_hash_depends_on_names_and_contents(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("x")
    b.write_text("y")
    first = setup_environment.hash_files([a, b])
    assert first == setup_environment.hash_files([b, a])
    a.write_text("y")
    b.write_text("x")
    assert first != setup_environment.hash_files([a, b])


def environment(tmp_path: Path, **stamp: object) -> setup_environment.Environment:
    """An Environment on this repository's pins, whose .venv holds nothing."""
    env = setup_environment.Environment(tmp_path / "venv", ROOT)
    assert env.why_new == "it is not there"
    env.stamp = stamp
    return env


def test_mmcv_is_rebuilt_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    env = environment(tmp_path)
    key = env.mmcv_key()
    assert key.startswith(f"{env.pins['mmcv']}-torch{env.pins['torch']}-cp3")
    env.installed = {"mmcv": env.pins["mmcv"]}
    env.stamp = {"mmcv": key}
    assert not env.mmcv_needed()
    env.stamp = {"mmcv": key.replace("torch2", "torch1")}
    assert env.mmcv_needed()
    env.stamp = {"mmcv": f"{key}_cuda"}
    assert not env.mmcv_needed(), "a CUDA build serves the CPU too"
    monkeypatch.setenv("FORCE_CUDA", "1")
    env.stamp = {"mmcv": key}
    assert env.mmcv_needed()


def test_detectron2_of_the_user_is_kept_and_ours_follows_its_folder(tmp_path: Path) -> None:
    env = environment(tmp_path, detectron2="other hash")
    assert env.detectron2_needed(), "missing"
    env.installed = {"detectron2": "0.6"}
    assert not env.detectron2_needed()
    env.installed = {"detectron2": "0.6+py"}
    assert env.detectron2_needed(), "its folder changed"
    env.stamp = env.hashes()
    assert not env.detectron2_needed()


def test_project_is_installed_again_for_changed_c_code_and_for_a_lost_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = environment(tmp_path)
    env.installed = {"detection-plugins": "0.1.0"}
    monkeypatch.setattr(env, "has_kernels", lambda: True)
    env.stamp = dict(env.hashes(), kernels=True)
    assert not env.project_needed()
    env.stamp["project"] = "other hash"
    assert env.project_needed(), "its C code changed"
    env.stamp = dict(env.hashes(), kernels=True)
    monkeypatch.setattr(env, "has_kernels", lambda: False)
    assert env.project_needed(), "the library was deleted"
    env.stamp["kernels"] = False
    assert not env.project_needed(), "there was none, as nothing could compile it"


def test_package_that_was_installed_before_is_brought_back(tmp_path: Path) -> None:
    env = environment(tmp_path)
    env.installed = dict(env.pins)
    assert env.other_changes() == []
    env.stamp = {"packages": dict(env.installed)}
    del env.installed["yacs"]
    assert [change.name for change in env.other_changes()] == ["yacs"]


def test_environment_that_was_moved_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    stamp = tmp_path / "venv" / setup_environment.STAMP_NAME
    stamp.write_text('{"root": "/another/folder"}')
    env = setup_environment.Environment(tmp_path / "venv", ROOT)
    assert env.why_new == "it was made in /another/folder, which its scripts name"


def test_max_jobs_that_is_no_number_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SetupError, match="MAX_JOBS=many: give the number of compilers"):
        setup_environment.build_mmcv(environment(tmp_path))


def test_built_wheel_is_found_under_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    env = environment(tmp_path)
    assert env.cached_mmcv() is None
    folder = tmp_path / "cache" / "detection-plugins" / "wheels" / env.mmcv_key()
    folder.mkdir(parents=True)
    (folder / "mmcv-2.1.0-cp311.whl").touch()
    assert env.cached_mmcv() == folder / "mmcv-2.1.0-cp311.whl"


def test_failed_command_shows_the_end_of_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("from an earlier step\n")
    code = "print('first'); print('what went wrong'); raise SystemExit(3)"
    with pytest.raises(SetupError, match=f"Trying it failed; the whole output is in {log}"):
        setup_environment.run([sys.executable, "-c", code], log, "trying it")
    shown = capsys.readouterr().out
    assert "what went wrong" in shown and "earlier" not in shown


def test_long_command_reports_that_it_runs_and_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_environment, "HEARTBEAT_SECONDS", 0.2)
    code = "import time; print('  [3/77] c++ -c a.cpp', flush=True); time.sleep(1)"
    setup_environment.run([sys.executable, "-c", code], tmp_path / "log", "building")
    assert "building: 0:00 so far, 3 of 77 files compiled" in capsys.readouterr().out


def test_stopping_set_up_stops_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import os, time\n"
        "open('pid.part', 'w').write(str(os.getpid()))\n"
        "os.rename('pid.part', 'pid')\n"
        "time.sleep(60)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, pathlib, runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"script = runpy.run_path({str(SCRIPT)!r})\n"
        "script['run'].__globals__['ROOT'] = pathlib.Path.cwd()\n"
        "script['run']([sys.executable, 'child.py'], pathlib.Path('log'), 'waiting')\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(parent)],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        # A shell's background jobs ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.time() + 20
    while not (tmp_path / "pid").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_clean_keeps_the_results_of_users(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in (".venv/bin", "plugin_core/__pycache__", "work_dirs/demo", "work_dirs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"Makefile", "plugin_core", "work_dirs", "work_dirs/mine"}
