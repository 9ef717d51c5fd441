"""Command line that registers the plugins and hands over to MMDetection's installed scripts.

MMPretrain's are handed over to in the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmcv.ops import get_compiling_cuda_version
from mmengine.config import Config
from torch import distributed

from mm_plugins.launch import arrange, explain_errors, is_main, only_training
from mm_plugins.pixels import find_mismatches
from mm_plugins.preflight import check_config
from mm_plugins.runner import SafeRunner
from mm_plugins.training_settings import check_options, check_training_settings
from plugin_core.shipped import shipped_config
from plugin_core.training.run_folder import OccupiedFolder


def run(name: str, package: str = "mmdet") -> None:
    """Run the script ``tools/<name>.py`` of MMDetection with the arguments of this process.

    The config is checked first, with the script's own arguments. A mistake in it is one clear line,
    and no work folder is touched.

    If mmcv's operators were built without CUDA, everything runs on the CPU, even beside a GPU.
    Without a GPU, several processes of torchrun run on the CPU, too.

    Args:
        name: "train" or "test".
        package: "mmdet", or "mmpretrain" for MMPretrain's script.

    Raises:
        SystemExit: if the config is wrong; the message says how.
    """
    # MMPretrain's models need none of mmcv's operators.
    if package == "mmdet" and torch.cuda.is_available() and not has_cuda_operators():
        print(
            "mmcv was built without its CUDA operators: running on the CPU. `FORCE_CUDA=1 make "
            "setup` builds them where nvcc is installed.",
            flush=True,
        )
        # mmengine has looked for a GPU already, when it was imported. So start anew.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, sys.orig_argv)
    installed = importlib.util.find_spec(package)
    if installed is None or installed.origin is None:
        sys.exit(f"error: {_NAMES[package]} is not installed: `pip install -e .[{package}]`")
    path = Path(installed.origin).parent / ".mim" / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{package}_tools_{name}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        sys.exit(f"error: this {_NAMES[package]} has no {path}; install it with pip or mim")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    local_rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")  # of mpirun; MMDetection ignores it
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", local_rank)
    try:
        sys.argv[1:] = map(shipped_config, sys.argv[1:])
        args = script.parse_args()
        if not Path(args.config).is_file():
            raise ValueError(f"there is no config file {args.config!r}")
        _check_launcher(args.launcher)
        cfg = _read(args.config, args.cfg_options)
        _check_package(cfg, args.config, name, package)
        if getattr(args, "no_validate", False):  # as MMPretrain's script does
            cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        if name == "test":
            cfg.load_from = args.checkpoint
        resumes = getattr(args, "resume", None) is not None or cfg.get("resume", False)
        check_training_settings(cfg, train=name == "train")
        model = check_config(cfg, train=name == "train", resumes=resumes)
        told, begins_with = arrange(args, cfg, model)
        side = "mm_plugins" if package == "mmdet" else f"mm_plugins.{package}"
        prepare = importlib.import_module(f"{side}.datasets").prepare
        copies = prepare(cfg, model, train=name == "train", checkpoint=begins_with)
        _read_copies(cfg, copies)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if is_main():
        for text in [*told, *([] if resumes else find_mismatches(cfg))]:
            print(f"warning: {text}", file=sys.stderr, flush=True)
    if args.launcher == "pytorch" and not torch.cuda.is_available():
        _distribute_over_cpus(cfg)
    try:
        with only_training(args, cfg), explain_errors():
            script.main()
    except OccupiedFolder as error:
        sys.exit(f"error: {error}")


_NAMES = {"mmdet": "MMDetection", "mmpretrain": "MMPretrain"}
# Launcher → program that starts the processes, and the variable that it sets in them
_LAUNCHERS = {
    "pytorch": ("torchrun --nproc_per_node …", "RANK"),
    "slurm": ("srun", "SLURM_PROCID"),
    "mpi": ("mpirun", "OMPI_COMM_WORLD_RANK"),
}


def _check_launcher(launcher: str) -> None:
    command, variable = _LAUNCHERS.get(launcher, ("", ""))
    if command and variable not in os.environ:
        raise ValueError(f"--launcher {launcher}: start this command by {command}, or leave it out")


def _check_package(cfg: Config, config: str, name: str, package: str) -> None:
    """Check that a config is one of this package, and let its parts be looked up there."""
    other = "mmpretrain" if package == "mmdet" else "mmdet"
    if not cfg.get("default_scope"):
        cfg.default_scope = package
    if cfg.default_scope == other:
        raise ValueError(
            f"config {config!r}: default_scope is {other!r}; use tools/{name}_{other}.py"
        )


def _read(config: str, options: dict[str, Any] | None) -> Config:
    if not config.endswith(".py"):
        raise ValueError(f"config {config!r}: expected Python; tools/train_net.py takes yaml")
    try:
        cfg = Config.fromfile(config)
        written = set(cfg)
        cfg.merge_from_dict(options or {})
    except Exception as error:  # of mmengine's reader, or of the config's own code
        reason = " ".join(str(error).split()) or "it cannot be read as a config of MMDetection"
        raise ValueError(f"config {config!r}: {type(error).__name__}: {reason[:500]}") from error
    check_options(options or {}, written)
    if "model" not in cfg:
        raise ValueError(f"config {config!r}: it defines no model, as the framework's own do")
    return cfg


def _distribute_over_cpus(cfg: Config) -> None:
    """Make torchrun's processes train together on the CPU. mmengine would ask for GPUs."""
    # mmengine keeps an existing process group, and lets a config choose the model's wrapper.
    distributed.init_process_group("gloo")
    wrapper: dict[str, Any] = {"device_ids": None}
    if not cfg.get("model_wrapper_cfg"):  # mmengine's own default
        wrapper |= {
            "type": "MMDistributedDataParallel",
            "find_unused_parameters": cfg.get("find_unused_parameters", False),
            "broadcast_buffers": False,
        }
    _change({f"model_wrapper_cfg.{key}": value for key, value in wrapper.items()})


def _read_copies(cfg: Config, copies: Mapping[str, str]) -> None:
    """Let the runner read copies of files. The config that it writes names the user's own files."""
    if "runner_type" not in cfg:
        SafeRunner.copies = copies
        return
    for path in copies.values():
        if set(path) & set(",[](){}'\""):  # which --cfg-options would take apart
            raise ValueError(
                f"DETECTION_PLUGINS_CACHE: {path!r} has commas, brackets or quotes; name a folder "
                "without them"
            )
    _change(copies)


def _change(settings: Mapping[str, Any]) -> None:
    """Change settings of the config in the arguments, which MMDetection's script reads."""
    if settings:
        sys.argv += ["--cfg-options", *(f"{key}={value}" for key, value in settings.items())]


def has_cuda_operators() -> bool:
    """Tell whether mmcv's operators run on a GPU."""
    return get_compiling_cuda_version() != "not available"
