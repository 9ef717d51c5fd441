"""Versions: asked for by constraints.txt and setup.py, installed, and the difference.

The syntax is kept to Python 3.6's, as in setup_environment.py.
"""

import ast
import hashlib
import re
import shutil
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

EXTRAS = (
    *("either", "detectron2", "mmdet", "mmpretrain", "timm", "grounding", "panoptic"),
    *("visualization", "docs", "dev"),
)


class SetupError(Exception):
    """Set-up cannot go on; the message is one sentence for the user."""


class Change(NamedTuple):
    """A package with another version than the pinned one."""

    name: str
    installed: Optional[str]  # None: not installed
    pinned: str

    def __str__(self) -> str:
        if self.installed is None:
            return "%s %s" % (self.name, self.pinned)
        return "%s %s -> %s" % (self.name, self.installed, self.pinned)


def normalize(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def marker_applies(marker: str, version: Tuple[int, int]) -> bool:
    """Evaluate `python_version < "3.11"` or `>=`, the only markers in constraints.txt."""
    match = re.match(r'^python_version\s*(<|>=)\s*"(\d+)\.(\d+)"$', marker.strip())
    if not match:
        raise SetupError(
            "constraints.txt: marker %r is not understood; write"
            ' python_version < "3.x" or python_version >= "3.x".' % marker
        )
    bound = (int(match.group(2)), int(match.group(3)))
    return version < bound if match.group(1) == "<" else version >= bound


def read_constraints(text: str, version: Tuple[int, int]) -> Dict[str, str]:
    """Read exact pins.

    Args:
        text: lines `name==version`, each with an optional marker and comment.
        version: major and minor version of the Python that the pins are for.

    Returns:
        The pinned version of each normalized name.

    Raises:
        SetupError: if a line is no exact pin.
    """
    pins = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        requirement, _, marker = line.partition(";")
        match = re.match(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)$", requirement.strip())
        if not match:
            raise SetupError(
                "constraints.txt line %d: %r is no exact pin; write name==version." % (number, line)
            )
        if not marker or marker_applies(marker, version):
            pins[normalize(match.group(1))] = match.group(2)
    return pins


def read_extras(setup_py: str) -> Dict[str, List[str]]:
    """Return the EXTRAS dictionary of setup.py without running the file."""
    for node in ast.parse(setup_py).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "EXTRAS":
            return ast.literal_eval(node.value)
    raise SetupError("setup.py has no dictionary EXTRAS; tools/setup_environment.py reads it.")


def direct_requirements(extras: Dict[str, List[str]]) -> List[str]:
    """Return the normalized names that the extras of the development environment ask for."""
    names = set()
    for extra in EXTRAS:
        for requirement in extras[extra]:
            names.add(normalize(re.split(r"[^A-Za-z0-9._-]", requirement.strip())[0]))
    return sorted(names)


def installed_versions(site_packages: Path) -> Dict[str, str]:
    """Return the version of each distribution in a site-packages folder."""
    from importlib import metadata

    versions = {}
    for distribution in metadata.distributions(path=[str(site_packages)]):
        name = distribution.metadata["Name"]
        if name:
            versions[normalize(name)] = distribution.version
    return versions


def remove_partial(site_packages: Path) -> None:
    """Remove the metadata of packages whose installation was interrupted.

    pip writes RECORD last, and refuses to replace a package that has none.
    """
    for folder in site_packages.glob("*.dist-info"):
        if not (folder / "RECORD").is_file():
            shutil.rmtree(str(folder))


def same_version(installed: str, pinned: str) -> bool:
    """Compare as `==` of pip does: a pin without a local label accepts any."""
    return installed == pinned or ("+" not in pinned and installed.split("+")[0] == pinned)


def changed_pins(
    pins: Dict[str, str], installed: Dict[str, str], wanted: Iterable[str] = ()
) -> List[Change]:
    """List the packages that differ from the pins.

    Args:
        pins: pinned versions.
        installed: installed versions.
        wanted: names that must be installed. Any other pin counts only if its package is
            installed: it may be a library that torch needs on another platform.

    Returns:
        One entry per package to install, sorted by name.
    """
    names = {name for name in pins if name in installed} | set(wanted)
    changes = []
    for name in sorted(names):
        if name not in pins:
            raise SetupError("constraints.txt has no pin of %s, which setup.py names." % name)
        if name not in installed or not same_version(installed[name], pins[name]):
            changes.append(Change(name, installed.get(name), pins[name]))
    return changes


def hash_files(paths: Iterable[Path]) -> str:
    """Return a hash of the files' names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
