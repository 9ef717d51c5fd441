"""Checks of the machine before the environment is set up on it.

Each check returns one sentence for the user on what is missing, or None. The syntax is kept to
Python 3.6's, as in setup_environment.py.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Callable, Optional, Tuple

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)
DISK_GB = 12  # torch with its CUDA libraries, pip's downloads and mmcv's build


def check_python(version: Tuple[int, ...]) -> Optional[str]:
    """Return the fault of this version of Python, or None."""
    if OLDEST_PYTHON <= tuple(version[:2]) <= NEWEST_PYTHON:
        return None
    return (
        "Python %d.%d to %d.%d is needed, and this is %d.%d: name another one with"
        " `make PYTHON=python3.11 ...`." % (OLDEST_PYTHON + NEWEST_PYTHON + tuple(version[:2]))
    )


def check_venv() -> Optional[str]:
    """Return the module that `python -m venv` lacks, or None."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return (
            "`%s -m venv` does not work (no module %s): install Python's venv package"
            " (python3-venv on Debian and Ubuntu)." % (sys.executable, error.name)
        )
    return None


def check_compiler(find: Callable[[str], Optional[str]] = shutil.which) -> Optional[str]:
    """Return which C++ compiler is missing, or None. mmcv's build asks for $CXX or c++."""
    compiler = os.environ.get("CXX", "c++")
    if find(compiler.split()[0] if compiler.strip() else compiler):
        return None
    return (
        "No C++ compiler (%s) was found, which mmcv's build needs: install one (g++ on Debian and"
        " Ubuntu) or set CXX." % compiler
    )


def check_headers(include: Optional[str] = None) -> Optional[str]:
    """Return that Python.h is missing, or None."""
    folder = include or sysconfig.get_paths()["include"]
    if (Path(folder) / "Python.h").is_file():
        return None
    return (
        "Python.h is not in %s, and mmcv's build needs it: install Python's development package"
        " (python3-dev on Debian and Ubuntu)." % folder
    )


def check_disk(folder: Path, free_bytes: Optional[int] = None) -> Optional[str]:
    """Return that the disk under `folder` is too full, or None."""
    free = shutil.disk_usage(str(folder)).free if free_bytes is None else free_bytes
    if free >= DISK_GB * 10**9:
        return None
    return "%d GB of free disk are needed in %s, and %.1f GB are there: make room first." % (
        DISK_GB,
        folder,
        free / 1e9,
    )
