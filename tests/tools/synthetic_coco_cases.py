"""Small drawn datasets, and the digests of their files."""

import hashlib
import json
from pathlib import Path

from synthetic_coco import make_dataset


def tree_digest(root: Path) -> dict[str, str]:
    """SHA-256 of every file under ``root``, by relative path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def make(out: Path, **options: object) -> Path:
    """A small dataset, quietly."""
    make_dataset(out, **{"train": 2, "val": 1, "size": 64, "progress": False, **options})
    return out


def annotations_of(root: Path, name: str) -> dict:
    return json.loads((root / f"annotations/{name}2017.json").read_text())
