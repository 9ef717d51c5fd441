"""Command line shared by ``tools/train_net.py`` and ``tools/lazyconfig_train_net.py``."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from torch.multiprocessing import ProcessExitedException

from d2_plugins.config import find_config_file
from d2_plugins.datasets import register_coco
from plugin_core.inspection.config_kinds import add_register_coco
from plugin_core.training import RunError
from plugin_core.training.run_folder import occupy

logger = logging.getLogger("detectron2.plugins")


def parse_args(description: str) -> argparse.Namespace:
    """Parse the arguments of Detectron2's own ``tools/train_net.py``, and ``--register-coco``."""
    parser = default_argument_parser()
    parser.description = description
    add_register_coco(parser, "register a COCO-format dataset; may be given several times")
    return parser.parse_args()


def apply_arguments(args: argparse.Namespace) -> None:
    """Find the config file, register the datasets, and check the number of processes.

    Raises:
        ValueError: if there is no such file, a dataset cannot be registered, or there are fewer
            GPUs than asked for.
    """
    if args.config_file:
        args.config_file = find_config_file(args.config_file)  # Detectron2 opens it once more
    gpus = torch.cuda.device_count()
    # Without a GPU the processes share the CPU.
    if gpus and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus {args.num_gpus}: PyTorch finds {gpus} GPUs here")
    for name, json_file, image_root in args.register_coco:
        register_coco(name, json_file, image_root)


def check_batch_size(args: argparse.Namespace, setting: str, batch_size: Any) -> None:
    """Check that a training's processes can share the images of a batch evenly.

    Raises:
        ValueError: if they cannot; the message names the setting.
    """
    processes = max(1, args.num_gpus * args.num_machines)
    if not args.eval_only and isinstance(batch_size, int) and batch_size % processes:
        raise ValueError(
            f"{setting}: {batch_size} images cannot be shared by {processes} processes; "
            f"set a multiple of {processes}"
        )


def check_amp(args: argparse.Namespace, setting: str, enabled: bool, device: str) -> None:
    """Check that a training in mixed precision has a GPU; raises ValueError."""
    if enabled and not args.eval_only and device == "cpu":
        raise ValueError(
            f"{setting}: mixed precision needs a GPU, and this run is on the CPU; set it to False"
        )


def warn(device: str, mismatches: Iterable[str]) -> None:
    """Warn that a run is on the CPU, and of wrong pixel settings."""
    if device == "cpu":
        logger.warning("Running on the CPU: PyTorch finds no GPU here, or the config says so.")
    for text in mismatches:
        logger.warning(text)


def run(
    args: argparse.Namespace,
    setup: Callable[[argparse.Namespace], Any],
    main: Callable[[argparse.Namespace, Any], Any],
) -> None:
    """Run ``main(args, setup(args))`` in as many processes as the arguments ask for.

    ``setup`` and ``main`` are functions of a module, so that processes can import them.

    Args:
        args: of :func:`parse_args`.
        setup: makes the config. A first call, before any process or folder is made, shows its
            ValueErrors to the user.
        main: trains or evaluates.

    Raises:
        SystemExit: if the set-up fails, or the run ends with a RunError or a full disk. The
            message is the error's.
    """
    try:
        cfg = setup(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    setting = "OUTPUT_DIR" if isinstance(cfg, CfgNode) else "train.output_dir"
    folder = cfg.OUTPUT_DIR if isinstance(cfg, CfgNode) else cfg.train.output_dir
    writes = not args.eval_only and not args.machine_rank and folder and "://" not in folder
    with _ending_in_a_line(), occupy(folder, setting) if writes else nullcontext():
        if args.num_gpus * args.num_machines <= 1:
            main(args, cfg)
            return
        launch(
            _run_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, setup, main),
        )


def _run_process(args: argparse.Namespace, setup: Callable, main: Callable) -> None:
    with _ending_in_a_line():
        main(args, setup(args))  # a spawned process has registered nothing yet


@contextmanager
def _ending_in_a_line() -> Iterator[None]:
    """Show an expected error as a line, without a traceback, and exit."""
    # Detectron2's loop logs each exception with its traceback.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_unexpected)
    try:
        yield
    except (RunError, OSError) as error:
        if not _is_expected(error):
            raise
        sys.exit(f"error: {error}")
    except ProcessExitedException as end:  # that process has shown the line
        sys.exit(end.exit_code)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _is_expected(record.exc_info[1]))


def _is_expected(error: BaseException | None) -> bool:
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RunError) or no_room
