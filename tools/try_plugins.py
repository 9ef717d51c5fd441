#!/usr/bin/env python
"""Try plugins on your own data: train your config as it is and with each plugin, and compare.

    tools/try_plugins.py your.yaml --register-coco my_train train.json images/ \\
        --register-coco my_val val.json images/ \\
        --with triplet_attention --with ida --with timm:eca --with batchformer_v1 --out trial
    tools/try_plugins.py your_config.py --with amc --seeds 5 --budget 8h --jobs 2 --out trial
    tools/try_plugins.py your_config.py --with wide_ida=your_ida.py --out trial

CONFIG is yours: a yaml file of Detectron2 or a Python file of MMDetection. From it one config is
derived for each plugin, in which only the plugin's lines differ; they are printed, and DIR/configs
keeps them for tools/train_net.py and tools/train_mmdet.py. A block plugin starts as the identity
(warm start). It is in all stages, ida in the last block of stages 4 and 5; ida@3,4,5 chooses. What
would freeze a stage with a plugin is changed. batchformer_v1 is in the RoI head, batchformer_v2 in
a DETR's encoder, amc among the losses. --control adds a plain detector that costs as much: it has
plain convolutions where the plugins are. NAME=CONFIG is a variant of your own, with the same number
of steps, images a step and test images.

All configs are checked before anything starts. All runs of a seed begin with the same weights but
for the plugin's own, and see the same images in the same order for the same number of steps. The
framework's own trainer trains them, with one thread each. The same command goes on where an earlier
one was stopped; runs that failed are tried again, and more --seeds are added.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import compare_detectors
from tabulate import tabulate

from plugin_core.evaluation.coco_files import Source
from plugin_core.evaluation.comparison.detections import MOST_DETECTIONS
from plugin_core.evaluation.comparison.inputs import read_truth
from plugin_core.evaluation.comparison.sections import Section
from plugin_core.inspection.config_kinds import (
    FRAMEWORKS,
    add_register_coco,
    is_lazy_config,
    side_of,
)
from plugin_core.training.run_folder import occupy
from plugin_core.training.trials import (
    CONTROL,
    PLAIN,
    Framework,
    Launcher,
    LocalLauncher,
    Plan,
    SlurmLauncher,
    config_path,
    derive_configs,
    difference,
    digest,
    duration,
    measure,
    measures_time,
    read_duration,
    read_plan,
    read_plugins,
    run_all,
    summary,
    training_section,
    write_plan,
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # The frameworks import it, some of them with every config.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    try:
        launcher = launcher_of(args)
        framework, plan = prepare(args)
        if args.jobs is None:
            args.jobs = len(plan.labels) * plan.seeds
        show(framework, plan, args.out)
        if args.plan:
            print_plan(plan, args)
            return
        failed = run(args, framework, plan, launcher)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    if failed:
        sys.exit(1)


def launcher_of(args: argparse.Namespace) -> Launcher:
    """Choose where trainings run; raises ValueError."""
    options = {"partition": args.partition} if args.partition else {}
    for text in args.slurm:
        key, is_given, value = text.partition("=")
        if not is_given:
            raise ValueError(f"--slurm {text}: expected KEY=VALUE such as gpus_per_node=1")
        options[key] = value
    if args.launcher == "slurm":
        return SlurmLauncher(args.out / "slurm", options)
    if options:
        raise ValueError("--partition, --slurm: are for --launcher slurm")
    if args.jobs is None:
        args.jobs = 1
    return LocalLauncher(find_gpus())


def prepare(args: argparse.Namespace) -> tuple[Framework, Plan]:
    """Check everything, then write the configs and the plan; raises ValueError."""
    for option in ("seeds", "jobs", "steps"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option}: must be 1 or more, got {value}")
    if "," in str(args.out):  # at which the comparison parts the files of a detector
        raise ValueError(f"--out {args.out}: has a comma; name another folder")
    if args.budget:
        read_duration(args.budget)
    plugins = read_plugins(args.plugins)
    # Relative to another folder they would be other files
    args.register_coco = [
        [name, *map(os.path.abspath, files)] for name, *files in args.register_coco
    ]
    framework = load(args)
    request: dict[str, Any] = {
        "config": framework.config,
        "config_content": digest(framework.settings(Path(framework.config))),
        "plugins": args.plugins,
        "control": args.control,
        "iou_type": args.iou_type if args.iou_type != "bbox" else None,
        "seeds": args.seeds,
        "steps": args.steps,
        "budget": args.budget,
        "datasets": args.register_coco,
    }
    for plugin in plugins:
        if plugin.config:
            request[plugin.config] = digest(framework.settings(Path(plugin.config)))
    plan = read_plan(args.out, request)
    if plan is not None:
        return framework, plan
    configs = derive_configs(framework, plugins, args.control)
    content = read_truth(Source("annotations", framework.annotations), args.iou_type)
    plan = Plan(
        request,
        framework.annotations,
        list(configs.parameters),
        framework.steps,
        args.seeds,
        configs.parameters,
        framework.batch_size,
        len(content["images"]),
        control=configs.control,
        iou_type=args.iou_type,
    )
    configs.write(framework, args.out)
    write_plan(plan, args.out)
    return framework, plan


def load(args: argparse.Namespace) -> Any:
    """Import the framework of the config; raises ValueError."""
    side = side_of(args.config)
    if args.config.endswith(".py") and is_lazy_config(args.config):
        raise ValueError(f"{args.config}: is a LazyConfig; this command takes yaml of Detectron2")
    try:
        if side == "d2_plugins":
            from d2_plugins.trials import Detectron2Trials

            return Detectron2Trials(args.config, args.register_coco, args.steps, args.iou_type)
        if args.register_coco:
            raise ValueError("--register-coco: is for Detectron2; MMDetection's config names data")
        from mm_plugins.trials import MMDetectionTrials

        return MMDetectionTrials(args.config, args.steps, args.iou_type)
    except ImportError as error:
        raise ValueError(f"{args.config}: needs {FRAMEWORKS[side]}: {error}") from error


def show(framework: Framework, plan: Plan, out: Path) -> None:
    """Print what each derived config changes."""
    plain = framework.settings(config_path(framework, out, PLAIN))
    for label in plan.labels[1:]:
        path = config_path(framework, out, label)
        print(f"{path}\n{difference(plain, framework.settings(path))}")
    if plan.control:
        print(plan.control)


def print_plan(plan: Plan, args: argparse.Namespace) -> None:
    """Print the number of runs and the estimated time."""
    left = duration(plan.left(args.jobs, args.out))
    time = f"about {left}" if plan.seconds_a_step else "not measured"
    finished = sum(run.finished() is not None for run in plan.runs(args.out))
    time += f" for the rest; finished before: {finished}" if finished else ""
    seeds = f"{plan.seeds} seeds" if plan.seeds > 1 else "1 seed"
    print(
        f"{len(plan.labels)} variants × {seeds} = {len(plan.labels) * plan.seeds} runs "
        f"of {plan.steps:,} steps, {args.jobs} at a time; time: {time}. {plan.left_out}".rstrip(),
        flush=True,
    )


def run(args: argparse.Namespace, framework: Framework, plan: Plan, launcher: Launcher) -> bool:
    """Train, and print what it found; returns whether a part of it failed."""
    with occupy(str(args.out), "--out"):
        if not plan.seconds_a_step and (measures_time(plan.steps) or args.budget):
            measure(plan, framework, args.out, launcher)
            if args.budget:
                plan.fit(read_duration(args.budget), args.jobs, may_shorten=args.steps is None)
            write_plan(plan, args.out)
        print_plan(plan, args)
        outcome = run_all(plan, framework, args.out, jobs=args.jobs, launcher=launcher)
        write_plan(plan, args.out)
    headers, rows = summary(plan, outcome, args.out)
    print(tabulate(rows, headers, "github", floatfmt=("", ".1f", ".1f", "", "", ".2f"), intfmt=","))
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason}")
    trained = training_section(plan, outcome, rows)
    compared = compare(framework, plan, args.out, outcome.finished, trained)
    return bool(outcome.failed) or not compared


def compare(
    framework: Framework, plan: Plan, out: Path, finished: Collection[str], trained: Section
) -> bool:
    """Hand the results over to tools/compare_detectors.py, the plain ones first.

    Returns whether they could be compared.
    """
    words: list[str] = []
    if not any(run.label == PLAIN and run.name in finished for run in plan.runs(out)):
        print(f"not compared: no run of {PLAIN} has finished")
        return False
    for label in plan.labels:
        runs = [run for run in plan.runs(out) if run.label == label and run.name in finished]
        if runs:
            words += ["--detector", f"{label}={','.join(str(run.results) for run in runs)}"]
            config = str(config_path(framework, out, label))
            weights = framework.weights(runs[0].folder, plan.steps)
            words += ["--config", f"{label}={config}:{weights}" if weights else f"{label}={config}"]
            words += ["--control", CONTROL] * (label == CONTROL)
    if framework.images and Path(framework.images).is_dir():
        words += ["--images", framework.images]
    words += ["--iou-type", plan.iou_type, "--out", str(out / "comparison")]
    try:
        compare_detectors.main([plan.annotations, *words], [trained])
    except SystemExit as end:
        print(f"not compared: {end.code}")
        return False
    return True


def find_gpus() -> list[str]:
    """Name the GPUs that processes may use."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return chosen.split(",")[:count] if chosen else [str(i) for i in range(count)]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="of your detector, .yaml or .py")
    parser.add_argument(
        "--with",
        dest="plugins",
        action="append",
        default=[],
        metavar="PLUGIN",
        help="triplet_attention, ida, timm:eca, package.module:Class, …, or NAME=CONFIG, a config "
        "of your own; several times",
    )
    parser.add_argument(
        "--control", action="store_true", help="also train a plain detector of no lower cost"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of all results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument(
        "--steps", type=int, help="of each training; the schedule is scaled (default: CONFIG's)"
    )
    parser.add_argument(
        "--budget", metavar="TIME", help="such as 8h; leaves out seeds, then steps, to keep it"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (default: 1, or all of them as jobs of Slurm)"
    )
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of submitit's, such as gpus_per_node=1 or timeout_min=600; several times",
    )
    parser.add_argument(
        "--iou-type",
        choices=list(MOST_DETECTIONS),
        default="bbox",
        help="AP of what (default: bbox)",
    )
    parser.add_argument("--plan", action="store_true", help="write configs and plan, and stop")
    add_register_coco(
        parser, "Detectron2: register a COCO-format dataset, as in tools/train_net.py"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
