"""What the command line checks and arranges around a training that has to survive."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from torch import Tensor, nn

from mm_plugins.runner import UNREADABLE, SafeRunner, names
from mm_plugins.schedules import ResumeError
from mm_plugins.weights import check_init_checkpoints, check_weights
from plugin_core.errors import few
from plugin_core.training.checkpoint_files import (
    check_readable,
    checkpoints_in,
    find_resumable,
)
from plugin_core.training.non_finite import NonFiniteLoss
from plugin_core.training.run_folder import occupy
from plugin_core.training.unreadable_images import UnreadableImage


def arrange(
    args: argparse.Namespace, cfg: Config, model: nn.Module | None
) -> tuple[list[str], str | None]:
    """Check what a run begins with, and hand its safe runner over by ``sys.argv``.

    Args:
        args: of MMDetection's script.
        cfg: the whole config, with the command line's options.
        model: as preflight has built it.

    Returns:
        What to warn of, and the checkpoint that is tested or resumed from, if there is one.

    Raises:
        ValueError: names the setting, its value and what would be right.
    """
    if "runner_type" not in cfg:
        sys.argv += ["--cfg-options", f"runner_type={SafeRunner.__name__}"]
    choice = cfg.get("unreadable_images", "error")
    if choice not in UNREADABLE:
        raise ValueError(
            f"unreadable_images: must be {' or '.join(map(repr, UNREADABLE))}, got {choice!r}"
        )
    if not hasattr(args, "resume"):  # of tools/test.py
        if model is not None and "://" not in args.checkpoint:
            check_weights(model, args.checkpoint, "CHECKPOINT", whole=True)
        return [], args.checkpoint
    _check_precision(args, cfg)
    if args.resume is not None or cfg.get("resume", False):
        return _arrange_resume(args, cfg)
    warnings = check_init_checkpoints(model, cfg.model) if model is not None else []
    if names := checkpoints_in(work_dir(args, cfg)):
        warnings.append(
            f"{work_dir(args, cfg)!r} has checkpoints of an earlier training ({few(names)}), which "
            "a later --resume may take for this one's; use another folder"
        )
    load_from = cfg.get("load_from")
    if load_from and model is not None and "://" not in load_from:
        warnings += check_weights(model, load_from, "load_from", whole=False)
    return warnings, None


def _check_precision(args: argparse.Namespace, cfg: Config) -> None:
    in_config = names(cfg.get("optim_wrapper", {}).get("type"), AmpOptimWrapper)
    if (args.amp or in_config) and not torch.cuda.is_available():
        setting = "--amp" if args.amp else "optim_wrapper.type='AmpOptimWrapper'"
        raise ValueError(
            f"{setting}: mmengine trains with mixed precision on a GPU only, and there is none; "
            "leave it out (optim_wrapper.type='OptimWrapper')"
        )


def is_main() -> bool:
    """Tell whether this is the first of the processes that a launcher has started."""
    ranks = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def work_dir(args: argparse.Namespace, cfg: Config) -> str:
    """Give the work folder as MMDetection's script chooses it."""
    name = os.path.splitext(os.path.basename(args.config))[0]
    return args.work_dir or cfg.get("work_dir") or os.path.join("./work_dirs", name)


def _arrange_resume(args: argparse.Namespace, cfg: Config) -> tuple[list[str], str | None]:
    SafeRunner.begins_anew = False
    named = args.resume if args.resume not in (None, "auto") else None
    if args.resume is None:
        named = cfg.get("load_from")
    if named:
        if "://" not in named:
            check_readable(os.path.expanduser(named), "--resume")
        return [], os.path.expanduser(named)
    hook: dict[str, Any] = dict(cfg.get("default_hooks", {}).get("checkpoint") or {})
    out = hook.get("out_dir")
    if out and "://" in str(out):
        return [], None
    folder = os.path.abspath(work_dir(args, cfg))
    last = folder
    if out:
        folder = os.path.join(out, os.path.basename(folder))
    kind = "epoch_{}.pth" if hook.get("by_epoch", True) else "iter_{}.pth"
    path, damaged = find_resumable(folder, hook.get("filename_tmpl") or kind, last)
    warnings = [
        f"--resume: {name!r} is missing or damaged; the next older one is tried" for name in damaged
    ]
    if path is None:
        told = f"--resume: there is no checkpoint in {folder!r}; training begins anew"
        if cfg.get("load_from"):  # which MMDetection's script leaves out then
            told += ", without load_from; leave out --resume to begin with it"
        SafeRunner.begins_anew = True
        return [*warnings, told], None
    sys.argv += ["--resume", path]
    return [*warnings, f"--resume: going on from {path!r}"], path


@contextmanager
def explain_errors() -> Iterator[None]:
    """End the process with one line for what the user's data or disk, or the guard, has stopped.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except (UnreadableImage, NonFiniteLoss, ResumeError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if told := _too_few_positions(error):
            sys.exit(f"error: {told}")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while {error.filename!r} was written" if error.filename else ""
        sys.exit(
            f"error: {error.strerror}{where}; earlier checkpoints are whole: make room and go on "
            "with --resume"
        )


def _too_few_positions(error: RuntimeError) -> str:
    """Say that a two-stage DETR was to choose more queries than its encoder has positions."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        memory, model = frame.f_locals.get("output_memory"), frame.f_locals.get("self")
        queries = getattr(model, "num_queries", 0)
        if frame.f_code.co_name == "pre_decoder" and isinstance(memory, Tensor):
            positions = memory.shape[1]
            if positions < queries:
                return (
                    f"model.num_queries: {queries} queries are chosen among the positions of the "
                    f"encoder, and this batch's images have {positions}; train on larger images "
                    "(Resize in the pipeline) or set fewer queries"
                )
    return ""


@contextmanager
def only_training(args: argparse.Namespace, cfg: Config) -> Iterator[None]:
    """Keep a training's work folder for it alone; nothing happens for a test.

    Raises:
        ValueError: if another training is in it.
    """
    if hasattr(args, "resume") and is_main():
        with occupy(work_dir(args, cfg), "--work-dir"):
            yield
    else:
        yield
