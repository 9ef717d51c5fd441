"""Telling a config's framework without importing either, and an option of its commands."""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path

FRAMEWORKS = {"d2_plugins": "Detectron2", "mm_plugins": "MMDetection"}


def add_register_coco(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the option ``--register-coco`` of Detectron2's configs; its value is a list of triples.

    Args:
        parser: of a command.
        help: what the dataset is for.
    """
    parser.add_argument(
        "--register-coco",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help=help,
    )


def common_side(config: str, baseline: str | None) -> str:
    """Name the package for a config and its baseline.

    Raises:
        ValueError: if there is no such file, or the two are of different frameworks.
    """
    sides = [side_of(name) for name in (config, baseline) if name]
    if len(set(sides)) > 1:
        first, second = (FRAMEWORKS[side] for side in sides)
        raise ValueError(
            f"--baseline {baseline}: a config of {second}, but {config} is one of {first}; both "
            "must be of the same framework"
        )
    return sides[0]


def side_of(config: str) -> str:
    """Name the package for a config; raises ValueError if it is a config of neither framework."""
    if config.startswith(("model_zoo://", "d2_plugins://")):
        return "d2_plugins"
    if config.startswith(("mmdet::", "mmpretrain::", "mm_plugins::")):
        return "mm_plugins"
    if not os.path.isfile(config):
        raise ValueError(f"{config}: there is no such config file")
    if config.endswith((".yaml", ".yml")):
        return "d2_plugins"
    if not config.endswith(".py"):
        raise ValueError(f"{config}: a config of neither framework; expected .yaml or .py")
    return "d2_plugins" if is_lazy_config(config) else "mm_plugins"


def is_lazy_config(path: str) -> bool:
    """Tell whether a .py config is in Detectron2's style: it imports Detectron2 or other configs.

    MMDetection's new style imports other configs, too, but below ``with read_base():``.
    """
    try:
        nodes = list(ast.walk(ast.parse(Path(path).read_bytes())))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not Python: {error}") from error
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [node.module or "" for node in imports if node.level == 0]
    names = {alias.name for node in imports for alias in node.names}
    packages = {module.split(".")[0] for module in modules}
    relative = any(node.level for node in imports)
    return bool(packages & {"detectron2", "d2_plugins"}) or (relative and "read_base" not in names)
