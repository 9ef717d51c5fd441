"""One command, ``detection-plugins``, for the scripts of ``tools/``, which an installation holds.

``detection-plugins compare …`` runs ``tools/compare_detectors.py …``.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence

from plugin_core import __version__
from plugin_core.errors import did_you_mean
from plugin_core.shipped import TOOLS

#: Sub-command → script
COMMANDS = {
    "train-d2": "train_net.py",
    "train-d2-lazy": "lazyconfig_train_net.py",
    "train-mmdet": "train_mmdet.py",
    "test-mmdet": "test_mmdet.py",
    "train-mmpretrain": "train_mmpretrain.py",
    "test-mmpretrain": "test_mmpretrain.py",
    "check-data": "check_dataset.py",
    "convert": "convert_checkpoint.py",
    "analyze": "analyze_model.py",
    "try": "try_plugins.py",
    "compare": "compare_detectors.py",
    "context-bias": "evaluate_context_bias.py",
    "visualize": "visualize_attention.py",
    "draw-scenes": "make_synthetic_coco.py",
    "tiny-text-model": "make_tiny_text_model.py",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script of a sub-command in place of this process.

    Args:
        arguments: a sub-command and what its script takes; by default those of this process.

    Raises:
        SystemExit: after the help or the version, or if there is no such sub-command.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        sys.exit()
    if name == "--version":
        print(f"detection-plugins {__version__}")
        sys.exit()
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; one of {', '.join(COMMANDS)}"
        sys.exit(f"error: there is no command {name!r}{hint}")
    words = [sys.executable, str(TOOLS / COMMANDS[name]), *rest]
    # A new process image, not a call: the frameworks start a script's processes anew by its path.
    os.execv(sys.executable, words)


def _help() -> str:
    lines = [
        "usage: detection-plugins COMMAND …, or --version",
        "",
        "Commands (COMMAND --help says more):",
    ]
    for name, script in COMMANDS.items():
        text = ast.get_docstring(ast.parse((TOOLS / script).read_text(encoding="utf-8"))) or ""
        summary = " ".join(text.partition("\n\n")[0].split())
        lines.append(f"  {name:17} {script}: {summary}")
    return "\n".join(lines)
