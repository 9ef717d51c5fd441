#!/usr/bin/env python3
"""Set up .venv, or bring it up to date. `make setup` runs this.

Installs exactly the versions of constraints.txt, builds mmcv with its ops once, and packs
Detectron2 from packaging/detectron2. Each step does only the missing work. So the next run
continues an interrupted set-up, and a changed pin reinstalls only its own package. When nothing is
to be done, it says so within a second.

Standard library only. The syntax is kept to Python 3.6's, so that an older Python can still read
the file and say which one is needed.

Environment variables:
    FORCE_CUDA: 1 builds mmcv's ops for CUDA too, which needs nvcc and takes much longer.
    MAX_JOBS: compilers that run at once while mmcv builds (default: one per core).
    XDG_CACHE_HOME: where the built mmcv wheel is kept (default: ~/.cache).
    CXX, and everything pip reads (PIP_INDEX_URL, PIP_CERT, ...): as usual.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

from environment_checks import (
    check_compiler,
    check_disk,
    check_headers,
    check_python,
    check_venv,
)
from environment_pins import (
    EXTRAS,
    Change,
    SetupError,
    changed_pins,
    direct_requirements,
    hash_files,
    installed_versions,
    read_constraints,
    read_extras,
    remove_partial,
)

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pip", "setuptools", "wheel", "ninja")
TORCH = ("torch", "torchvision")
DETECTRON2_LABEL = "+py"  # local version of the wheel that packaging/detectron2 builds
HEARTBEAT_SECONDS = 30
LOG_TAIL_LINES = 30
STAMP_NAME = "detection-plugins-setup.json"
LOG_NAME = "setup.log"


def cache_folder() -> Path:
    """Return the folder of built wheels, shared by all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "detection-plugins" / "wheels"


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wants_cuda() -> bool:
    """Tell whether the user asks for mmcv's CUDA ops, by the variable of mmcv's own build."""
    return os.environ.get("FORCE_CUDA") == "1"


# --- the environment ---------------------------------------------------------------------


class Environment:
    """The virtual environment, and the work that it needs.

    Args:
        venv: folder of the environment.
        root: folder of the repository.
    """

    def __init__(self, venv: Path, root: Path) -> None:
        self.venv = venv
        self.root = root
        self.python = venv / "bin" / "python"
        self.version = (sys.version_info[0], sys.version_info[1])
        self.site = venv / "lib" / ("python%d.%d" % self.version) / "site-packages"
        self.pins = read_constraints((root / "constraints.txt").read_text("utf-8"), self.version)
        self.direct = direct_requirements(read_extras((root / "setup.py").read_text("utf-8")))
        self.stamp = self._read_stamp()
        self.why_new = self._why_new()
        self.installed = {}  # type: Dict[str, str]
        if self.why_new is None:
            remove_partial(self.site)
            self.refresh()
        else:
            self.stamp = {}

    def refresh(self) -> None:
        """Look again at the installed versions."""
        self.installed = installed_versions(self.site)

    def _read_stamp(self) -> Dict[str, Any]:
        try:
            stamp = json.loads((self.venv / STAMP_NAME).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self) -> None:
        """Record the inputs of this set-up. The stamp is written last: it vouches for all steps."""
        self.refresh()
        mmcv = self.mmcv_key() if self.mmcv_needed() else self.stamp["mmcv"]
        stamp = dict(
            self.hashes(),
            root=str(self.root),
            mmcv=mmcv,
            packages=self.installed,
            kernels=self.has_kernels(),
        )
        text = json.dumps(stamp, indent=1, sort_keys=True)
        (self.venv / STAMP_NAME).write_text(text + "\n", "utf-8")

    def hashes(self) -> Dict[str, str]:
        """Return hashes of the parts of this repository that are installed."""
        packaging = self.root / "packaging" / "detectron2"
        return {
            "detectron2": hash_files(packaging / name for name in ("backend.py", "pyproject.toml")),
            "project": hash_files(
                [self.root / "setup.py", self.root / "pyproject.toml"]
                + list((self.root / "plugin_core" / "kernels").glob("*.[ch]"))  # compiled then
            ),
        }

    def _why_new(self) -> Optional[str]:
        """Return why the environment has to be made anew, or None."""
        if not self.venv.exists():
            return "it is not there"
        if self.stamp.get("root", str(self.root)) != str(self.root):
            return "it was made in %s, which its scripts name" % self.stamp["root"]
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            output = subprocess.check_output(
                [str(self.python), "-c", code], stderr=subprocess.DEVNULL, env=environment()
            )
        except (OSError, subprocess.CalledProcessError):
            return "its python does not run"
        if output.decode().strip() != "%d.%d" % self.version:
            return "its Python is %s, and this is %d.%d" % (
                (output.decode().strip(),) + self.version
            )
        pip = [str(self.python), "-m", "pip", "--version"]
        if subprocess.call(
            pip, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        ):
            return "its pip does not run"
        return None

    def tool_changes(self) -> List[Change]:
        """Return the packaging tools to install."""
        return changed_pins({name: self.pins[name] for name in TOOLS}, self.installed, TOOLS)

    def torch_changes(self) -> List[Change]:
        """Return torch and torchvision, where they are to be installed."""
        return changed_pins({name: self.pins[name] for name in TORCH}, self.installed, TORCH)

    def other_changes(self) -> List[Change]:
        """Return every other package to install, except mmcv."""
        before = TOOLS + TORCH + ("mmcv",)
        pins = {name: pin for name, pin in self.pins.items() if name not in before}
        complete = self.stamp.get("packages", {})
        wanted = {name for name in self.direct + list(complete) if name in pins}
        wanted |= {name for name in self.direct if name not in before}
        return changed_pins(pins, self.installed, wanted)

    def mmcv_key(self) -> str:
        """Name the build of mmcv that fits: its version, torch's build, Python and platform."""
        try:
            text = (self.site / "torch" / "version.py").read_text("utf-8")
            torch = re.findall(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)[0]
        except (OSError, IndexError):
            torch = self.pins["torch"]
        platform = sysconfig.get_platform().replace("-", "_") + ("_cuda" if wants_cuda() else "")
        return "%s-torch%s-cp%d%d-%s" % ((self.pins["mmcv"], torch) + self.version + (platform,))

    def mmcv_needed(self) -> bool:
        """Tell whether mmcv is missing, of another version, or built for another torch."""
        if self.installed.get("mmcv") != self.pins["mmcv"]:
            return True
        # A build for CUDA serves without CUDA, too.
        return self.stamp.get("mmcv") not in (self.mmcv_key(), self.mmcv_key() + "_cuda")

    def cached_mmcv(self) -> Optional[Path]:
        """Return the wheel built earlier for this torch, or None."""
        wheels = sorted((cache_folder() / self.mmcv_key()).glob("mmcv-*.whl"))
        return wheels[0] if wheels else None

    def detectron2_needed(self) -> bool:
        """Tell whether our wheel is missing or outdated. A user's own Detectron2 is kept."""
        version = self.installed.get("detectron2")
        if version is not None and not version.endswith(DETECTRON2_LABEL):
            return False
        return version is None or self.stamp.get("detectron2") != self.hashes()["detectron2"]

    def has_kernels(self) -> bool:
        """Tell whether the project's C code is compiled. Without a fitting compiler it is not."""
        return any((self.root / "plugin_core" / "kernels").glob("_library*"))

    def project_needed(self) -> bool:
        """Tell whether this repository's own metadata or compiled code is missing or outdated."""
        missing = "detection-plugins" not in self.installed
        missing = missing or (self.stamp.get("kernels", True) and not self.has_kernels())
        return missing or self.stamp.get("project") != self.hashes()["project"]

    def complete(self) -> bool:
        """Tell whether nothing is left to do."""
        return not (
            self.why_new
            or self.tool_changes()
            or self.torch_changes()
            or self.other_changes()
            or self.mmcv_needed()
            or self.detectron2_needed()
            or self.project_needed()
        )

    def problems(self) -> List[str]:
        """Return one sentence for each thing that this machine lacks for the open steps."""
        found = [check_venv()]
        if self.mmcv_needed() and self.cached_mmcv() is None:
            found += [check_compiler(), check_headers()]
        if self.torch_changes():
            found.append(check_disk(self.root))
        return [problem for problem in found if problem]


# --- running things ----------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line at once, also when the output is a file or a pipe."""
    print(text, flush=True)


def environment(**extra: str) -> Dict[str, str]:
    """Return the environment for child processes, without another Python's settings."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env.update(extra)
    return env


def clock(seconds: float) -> str:
    """Format a duration as minutes:seconds."""
    return "%d:%02d" % divmod(int(seconds), 60)


def build_progress(log: Path) -> str:
    """Return the number of objects that ninja has compiled, by the last `[n/m]` in the log."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 65536))
        counts = re.findall(rb"^\s*\[(\d+)/(\d+)\]", file.read(), re.MULTILINE)
    return ", %s of %s files compiled" % tuple(n.decode() for n in counts[-1]) if counts else ""


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a process and its children as Ctrl-C does: pip then undoes what it had begun."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: List[str], log: Path, doing: str, **extra: str) -> None:
    """Run a command with its output in the log, and say every 30 s that it still runs.

    Raises:
        SetupError: if it fails; the end of its output is shown first.
    """
    with log.open("ab") as output:
        output.write(("\n$ %s\n" % " ".join(command)).encode())
        output.flush()
        begin = output.tell()
        # A session of its own, so that stopping it also stops the compilers it started.
        process = subprocess.Popen(
            command,
            cwd=str(ROOT),
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started = time.time()
        try:
            while True:
                try:
                    code = process.wait(timeout=HEARTBEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress = build_progress(log)
                    say("      %s: %s so far%s" % (doing, clock(time.time() - started), progress))
        except BaseException:
            stop(process)
            raise
    if code:
        with log.open("rb") as file:
            file.seek(begin)
            lines = file.read().decode("utf-8", "replace").splitlines()
        say("\n".join("      | " + line for line in lines[-LOG_TAIL_LINES:]))
        raise SetupError(
            "%s failed; the whole output is in %s." % (doing[0].upper() + doing[1:], log)
        )


def pip(env: Environment, doing: str, *arguments: str) -> None:
    """Run pip in the environment with our pins, and without an index: users set their own."""
    command = [str(env.python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    command += ["-c", str(env.root / "constraints.txt")]
    run(command + list(arguments), env.venv / LOG_NAME, doing)


def python_error(env: Environment, code: str) -> Optional[str]:
    """Run a line of Python in the environment; return its last line of error, or None."""
    process = subprocess.Popen(
        [str(env.python), "-c", code],
        cwd=str(env.venv),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    error = process.communicate()[1].decode("utf-8", "replace").strip()
    return (
        (error.splitlines() or ["exit code %d" % process.returncode])[-1]
        if process.returncode
        else None
    )


# --- the steps ---------------------------------------------------------------------------


def pinned(changes: Iterable[Change]) -> List[str]:
    """Return the changes as arguments for pip."""
    return ["%s==%s" % (change.name, change.pinned) for change in changes]


def summary(changes: List[Change], most: int = 6) -> str:
    """Return the changes in words, shortened where there are many."""
    words = [str(change) for change in changes[:most]]
    if len(changes) > most:
        words.append("%d more" % (len(changes) - most))
    return ", ".join(words)


def create(env: Environment) -> None:
    """Make the virtual environment anew."""
    if env.venv.exists():
        say("%s is made anew: %s" % (env.venv.name, env.why_new))
        shutil.rmtree(str(env.venv))
    command = [sys.executable, "-m", "venv", str(env.venv)]
    if subprocess.call(command, env=environment()):
        raise SetupError("`%s` failed." % " ".join(command))
    env.why_new = None
    env.refresh()


def build_minutes(jobs: str) -> int:
    """Estimate the minutes of mmcv's build without CUDA: 3 on 2 cores."""
    return max(2, round(6 / min(int(jobs), cpu_count())))


def compiler_flags(env: Environment, work: Path) -> str:
    """Return CFLAGS for mmcv's build: Python's own, no debug symbols, torch's headers read once.

    Reading the headers is most of the time of each of mmcv's files. A compiler ignores a
    precompiled header that does not fit, and reads the text beside it instead.
    """
    header = work / "torch_headers.h"
    header.write_text("#include <torch/types.h>\n")
    asked = (
        "import sysconfig as s; from torch.utils.cpp_extension import include_paths as p; "
        "print(s.get_config_var('CFLAGS')); print(s.get_config_var('CCSHARED') or '', "
        "*('-I' + i for i in [*p(), s.get_path('include')]))"
    )
    command = [str(env.python), "-c", asked]
    output = subprocess.check_output(command, env=environment(), stderr=subprocess.DEVNULL)
    usual, others = output.decode().splitlines()
    # The build takes CFLAGS instead of Python's own flags.
    flags = "%s -g0" % (os.environ.get("CFLAGS") or usual)
    command = [os.environ.get("CXX") or "c++", *flags.split(), *others.split(), "-std=c++17"]
    command += ["-x", "c++-header", str(header), "-o", str(header) + ".gch"]
    if " " in str(header) or not shutil.which(command[0]):  # the build splits flags at spaces
        return flags
    with (work / "torch_headers.log").open("wb") as log:
        failed = subprocess.call(command, env=environment(), stdout=log, stderr=log)
    return flags if failed else "%s -include %s" % (flags, header)


def build_mmcv(env: Environment) -> Path:
    """Build mmcv with its ops and keep the wheel.

    pip's own cache is not used: it knows neither which torch a wheel was built for nor whether
    the ops are in it.

    Returns:
        The wheel's path in the cache, where it appears only when whole.
    """
    version, jobs = env.pins["mmcv"], os.environ.get("MAX_JOBS") or str(cpu_count())
    if not jobs.isdigit() or int(jobs) < 1:
        raise SetupError(
            "MAX_JOBS=%s: give the number of compilers to run at once, or unset it." % jobs
        )
    target = cache_folder() / env.mmcv_key()
    duration = (
        "more than half an hour" if wants_cuda() else "about %d minutes" % build_minutes(jobs)
    )
    say(
        "      building mmcv %s with its ops: %s with %s compilers at once; once, since the wheel"
        " is kept in %s" % (version, duration, jobs, target)
    )
    work = env.venv / "mmcv-build"
    shutil.rmtree(str(work), ignore_errors=True)  # of an interrupted build
    for name in ("wheel", "tmp"):
        (work / name).mkdir(parents=True)
    extra = {"MMCV_WITH_OPS": "1", "MAX_JOBS": jobs, "TMPDIR": str(work / "tmp")}
    # The build must find ninja and the headers of this environment.
    extra["PATH"] = os.pathsep.join([str(env.venv / "bin"), os.environ.get("PATH", os.defpath)])
    if not wants_cuda():
        extra["CFLAGS"] = compiler_flags(env, work)
        extra["CUDA_VISIBLE_DEVICES"] = ""  # a GPU in sight would make the build ask for nvcc
    command = [str(env.python), "-m", "pip", "wheel", "--verbose", "--no-deps"]
    command += ["--no-build-isolation", "--no-cache-dir", "--no-binary", "mmcv", "--no-input"]
    command += ["--progress-bar", "off", "-c", str(env.root / "constraints.txt")]
    command += ["--wheel-dir", str(work / "wheel"), "mmcv==" + version]
    started = time.time()
    run(command, env.venv / LOG_NAME, "building mmcv", **extra)
    (wheel,) = (work / "wheel").glob("mmcv-*.whl")
    with zipfile.ZipFile(str(wheel)) as archive:
        if not any(name.startswith("mmcv/_ext.") for name in archive.namelist()):
            raise SetupError("%s was built without its ops; it is not used." % wheel)
    say("      built mmcv %s in %s" % (version, clock(time.time() - started)))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name("%s.part-%d" % (target.name, os.getpid()))
    shutil.copytree(str(work / "wheel"), str(part))
    shutil.rmtree(str(target), ignore_errors=True)
    part.rename(target)
    shutil.rmtree(str(work))
    return target / wheel.name


def install_mmcv(env: Environment) -> None:
    """Install mmcv from the wheel built for this torch, building it first if there is none."""
    wheel = env.cached_mmcv() or build_mmcv(env)
    pip(env, "installing mmcv", "--no-deps", "--force-reinstall", str(wheel))
    if shutil.which("nvidia-smi") and not wants_cuda():
        say("      mmcv's ops run on the CPU; `FORCE_CUDA=1 make setup` builds those for the GPU")
    error = python_error(env, "import torch, mmcv._ext")
    if error:
        raise SetupError(
            "mmcv's ops do not load (%s): delete %s, and the next run builds them again."
            % (error, wheel.parent)
        )


def check_opencv(env: Environment) -> None:
    """Replace OpenCV's files by its headless build's where the system lacks libGL.

    The headless package goes over the other one. The other one's metadata stays, as mmcv and
    mmengine require it by name.
    """
    error = python_error(env, "import cv2")
    if not error:
        return
    version = env.pins["opencv-python"]
    say("      opencv-python does not load (%s): taking opencv-python-headless" % error)
    pip(
        env,
        "installing opencv-python-headless",
        "--no-deps",
        "--force-reinstall",
        "opencv-python-headless==" + version,
    )
    error = python_error(env, "import cv2")
    if error:
        raise SetupError("OpenCV does not load (%s): install what it names." % error)


def set_up(env: Environment) -> None:
    """Do every step that is needed, in order, and write the stamp."""
    if env.why_new:
        create(env)
    (env.venv / LOG_NAME).write_bytes(b"")

    changes = env.tool_changes()
    if changes:
        say("[1/6] packaging tools: %s" % summary(changes))
        pip(env, "installing packaging tools", *pinned(changes))

    changes = env.torch_changes()
    if changes:
        say("[2/6] %s (about 1 minute, 5 GB)" % summary(changes))
        pip(env, "installing torch", *pinned(changes))
        env.refresh()

    changes = env.other_changes()
    if changes:
        say("[3/6] other packages: %s" % summary(changes))
        pip(env, "installing packages", *pinned(changes))

    if env.mmcv_needed():
        say("[4/6] mmcv %s" % env.pins["mmcv"])
        install_mmcv(env)

    if env.detectron2_needed():
        say("[5/6] Detectron2 v0.6 without compiled ops, from packaging/detectron2")
        folder = str(env.root / "packaging" / "detectron2")
        pip(env, "installing Detectron2", folder)
    elif not env.installed.get("detectron2", DETECTRON2_LABEL).endswith(DETECTRON2_LABEL):
        say("[5/6] Detectron2 %s is kept: it is your own" % env.installed["detectron2"])

    say("[6/6] detection-plugins itself, and a check of what was installed")
    if env.project_needed():
        project = "%s[%s]" % (env.root, ",".join(EXTRAS))
        pip(env, "installing detection-plugins", "--no-build-isolation", "-e", project)
    check_opencv(env)
    env.write_stamp()


def main() -> int:
    """Set up the environment; return the exit code."""
    problem = check_python(sys.version_info[:3])
    if problem:
        print(problem, file=sys.stderr)
        return 1
    # A background shell may have made us ignore these two signals. Then our children would run on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.time()
    try:
        env = Environment(ROOT / ".venv", ROOT)
        if env.complete():
            say("%s is up to date" % env.venv.name)
            return 0
        problems = env.problems()
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 1
        say("setting up %s (log: %s)" % (env.venv.name, env.venv / LOG_NAME))
        set_up(env)
        say("%s is ready after %s" % (env.venv.name, clock(time.time() - started)))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the next run continues here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
