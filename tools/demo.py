#!/usr/bin/env python
"""Train and evaluate Faster R-CNN with triplet attention under both frameworks' own trainers.

The demo draws a small COCO-format dataset and runs the command lines that a user would type. It
compares each detector with the plain one, draws detections on val images, and ends with a table.
Everything is written below work_dirs/demo. Each framework takes some minutes on 2 CPU cores.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("work_dirs/demo")
DATA = OUT / "coco"
# Names, annotations and images, for tools/train_net.py
SPLITS = [
    (f"synthetic_{part}", f"{DATA}/annotations/instances_{part}2017.json", f"{DATA}/{part}2017")
    for part in ("train", "val")
]
D2_CONFIG = "configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml"
MM_CONFIG = "configs/mm/synthetic/faster-rcnn_r18-triplet_fpn_synthetic.py"
IMAGE_SIZE = 128  # side in pixels of the image for counting FLOPs
PROPOSALS = 100  # in this image, the same number in every model, so that FLOPs compare
PICTURES = 8
ENLARGE = 4  # pictures, as the images are small
SCORE = 0.4  # least score of a drawn detection
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Row:
    """A line of the table."""

    framework: str
    model: str
    parameters: int
    gflops: float
    seconds_a_step: float
    ap: float | None = None
    ap50: float | None = None


def main() -> None:
    start = time.time()
    say("1/5  drawing 400 train and 100 val images")
    run(
        *("tools/make_synthetic_coco.py", str(DATA), "--force", "--train", "400", "--val", "100"),
        *("--size", str(IMAGE_SIZE), "--seed", "0", "--classes", "4"),
    )
    say("2/5  Detectron2: training and evaluating")
    d2_ap, d2_ap50 = train_detectron2()
    say("3/5  MMDetection: training and evaluating")
    mm_ap, mm_ap50 = train_mmdetection()
    say("4/5  comparing with the same detectors without attention")
    rows = measure_detectron2() + measure_mmdetection()
    rows[1].ap, rows[1].ap50 = d2_ap, d2_ap50
    rows[3].ap, rows[3].ap50 = mm_ap, mm_ap50
    say("5/5  drawing ground truth and detections")
    draw_detectron2()
    draw_mmdetection()
    write_table(rows, time.time() - start)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: str, log: Path | None = None, steps: int = 0) -> None:
    """Run a tool of this project; with ``log``, write its output there and show its steps here."""
    print("$ python", shlex.join(command), flush=True)
    full = [sys.executable, *command]
    if log is None:
        subprocess.run(full, check=True)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as output, tqdm(total=steps, unit="step", mininterval=5) as bar:
        process = subprocess.Popen(full, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(1)
            bar.update(min(last_step(log.parent), steps) - bar.n)
        bar.update(min(last_step(log.parent), steps) - bar.n)
    if process.returncode:
        sys.exit(f"{''.join(log.read_text().splitlines(True)[-30:])}\nfailed; see {log}")


def records(folder: Path) -> list[dict[str, Any]]:
    """Read the records that the framework wrote in its last run, in order."""
    files = [folder / "metrics.json", *sorted(folder.glob("*/vis_data/scalars.json"))]
    lines = [line for f in files if f.exists() for line in f.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(folder: Path) -> int:
    """Count the finished steps: Detectron2 counts from 0, and evaluates after the last step."""
    steps = [r.get("iteration", r.get("step", 0) - 1) + 1 for r in records(folder)]
    return max(steps, default=0)


# --- Detectron2 ------------------------------------------------------------------------------- #


def train_detectron2() -> tuple[float, float]:
    """Train and evaluate; returns box AP and AP50, in percent."""
    from detectron2.config import get_cfg

    register = [argument for dataset in SPLITS for argument in ("--register-coco", *dataset)]
    out = fresh(OUT / "detectron2")
    steps = detectron2_config(get_cfg()).SOLVER.MAX_ITER
    command = ["tools/train_net.py", "--config-file", D2_CONFIG, *register, "OUTPUT_DIR", str(out)]
    run(*command, log=out / "output.txt", steps=steps)
    last = records(out)[-1]
    return last["bbox/AP"], last["bbox/AP50"]


def detectron2_config(cfg: Any, *options: Any) -> Any:
    from d2_plugins import add_plugin_config, merge_config

    add_plugin_config(cfg)
    merge_config(cfg, D2_CONFIG, ["MODEL.DEVICE", DEVICE, *options])
    return cfg


def measure_detectron2() -> list[Row]:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from d2_plugins.analysis import analyze
    from d2_plugins.data import ResumableTrainLoader
    from d2_plugins.datasets import register_coco

    for dataset in SPLITS:
        register_coco(*dataset)
    plain = ("MODEL.RESNETS.PLUGINS", [])
    fixed = ("MODEL.RPN.POST_NMS_TOPK_TEST", PROPOSALS)
    batch = next(iter(ResumableTrainLoader(detectron2_config(get_cfg()))))
    steps, rows = [], []
    for model_name, options in (("plain", plain), ("triplet attention", ())):
        counted = detectron2_config(get_cfg(), *fixed, *options)
        cost = analyze(counted, (IMAGE_SIZE, IMAGE_SIZE)).total
        name = f"R18-FPN, {model_name}"
        rows.append(Row("Detectron2", name, cost.parameters, cost.flops / 1e9, 0.0))
        model = build_model(detectron2_config(get_cfg(), *options)).train()
        steps.append(training_step(model, lambda m=model: sum(m(batch).values())))
    with EventStorage():  # losses are logged there
        for row, seconds in zip(rows, time_alternately(steps), strict=True):
            row.seconds_a_step = seconds
    return rows


def draw_detectron2() -> None:
    import numpy as np
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.detection_utils import read_image
    from detectron2.engine import DefaultPredictor
    from detectron2.utils.visualizer import Visualizer
    from PIL import Image

    weights = OUT / "detectron2" / "model_final.pth"
    predict = DefaultPredictor(detectron2_config(get_cfg(), "MODEL.WEIGHTS", str(weights)))
    metadata = MetadataCatalog.get("synthetic_val")
    folder = fresh(OUT / "pictures_detectron2")
    for sample in DatasetCatalog.get("synthetic_val")[:PICTURES]:
        image = read_image(sample["file_name"], "RGB")
        instances = predict(image[:, :, ::-1])["instances"].to("cpu")
        sides = [
            Visualizer(image, metadata, scale=ENLARGE).draw_dataset_dict(sample),
            Visualizer(image, metadata, scale=ENLARGE).draw_instance_predictions(
                instances[instances.scores > SCORE]
            ),
        ]
        both = np.concatenate([side.get_image() for side in sides], axis=1)
        Image.fromarray(both).save(folder / f"{Path(sample['file_name']).stem}.png")


# --- MMDetection ------------------------------------------------------------------------------ #


def train_mmdetection() -> tuple[float, float]:
    """Train and evaluate; returns box AP and AP50, in percent."""
    out = fresh(OUT / "mmdetection")
    command = ["tools/train_mmdet.py", MM_CONFIG, "--work-dir", str(out), "--cfg-options"]
    settings = mmdetection_options()
    run(
        *command,
        *(f"{key}={value}" for key, value in settings.items()),
        log=out / "output.txt",
        steps=mmdetection_config().train_cfg.max_iters,
    )
    last = records(out)[-1]
    return 100 * last["coco/bbox_mAP"], 100 * last["coco/bbox_mAP_50"]


def mmdetection_options() -> dict[str, str]:
    options = {
        f"{part}_dataloader.dataset.data_root": f"{DATA}/" for part in ("train", "val", "test")
    }
    annotations = str(DATA / "annotations" / "instances_val2017.json")
    return options | {f"{part}_evaluator.ann_file": annotations for part in ("val", "test")}


def mmdetection_config() -> Any:
    from mmengine.config import Config

    cfg = Config.fromfile(MM_CONFIG)
    cfg.merge_from_dict(mmdetection_options())
    return cfg


def mmdetection_device() -> str:
    """Choose the GPU if mmcv's operators were built for it, otherwise the CPU."""
    from mm_plugins.command_line import has_cuda_operators

    return DEVICE if has_cuda_operators() else "cpu"


def measure_mmdetection() -> list[Row]:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.runner import Runner

    import mm_plugins  # noqa: F401  # registers the plugins
    from mm_plugins.analysis import analyze

    register_all_modules()
    cfg = mmdetection_config()
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    cfg.model.test_cfg.rpn.max_per_img = PROPOSALS
    plain = copy.deepcopy(cfg)
    plain.model.backbone.pop("plugins")
    steps, rows = [], []
    for model_name, counted in (("plain", plain), ("triplet attention", cfg)):
        model = MODELS.build(counted.model).to(mmdetection_device()).train()
        data = model.data_preprocessor(batch, training=True)
        steps.append(
            training_step(model, lambda m=model, d=data: m.parse_losses(m(**d, mode="loss"))[0])
        )
        cost = analyze(counted, (IMAGE_SIZE, IMAGE_SIZE)).total
        name = f"R18-FPN, {model_name}"
        rows.append(Row("MMDetection", name, cost.parameters, cost.flops / 1e9, 0.0))
    for row, seconds in zip(rows, time_alternately(steps), strict=True):
        row.seconds_a_step = seconds
    return rows


def draw_mmdetection() -> None:
    import mmcv
    from mmdet.apis import inference_detector, init_detector
    from mmdet.models.utils import samplelist_boxtype2tensor
    from mmdet.registry import DATASETS
    from mmdet.visualization import DetLocalVisualizer

    cfg = mmdetection_config()
    checkpoint = (OUT / "mmdetection" / "last_checkpoint").read_text().strip()
    model = init_detector(cfg, checkpoint, device=mmdetection_device())
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    folder = fresh(OUT / "pictures_mmdetection")
    for i in range(PICTURES):
        path = dataset.get_data_info(i)["img_path"]
        sample = inference_detector(model, path)
        sample.gt_instances = dataset[i]["data_samples"].gt_instances
        samplelist_boxtype2tensor([sample])
        for boxes in (sample.gt_instances.bboxes, sample.pred_instances.bboxes):
            boxes *= ENLARGE
        image = mmcv.imrescale(mmcv.imread(path, channel_order="rgb"), ENLARGE)
        out_file = str(folder / f"{Path(path).stem}.png")
        visualizer.add_datasample("val", image, sample, pred_score_thr=SCORE, out_file=out_file)


# --- both ------------------------------------------------------------------------------------- #


def fresh(folder: Path) -> Path:
    """Make an empty folder of the demo's own, without an earlier demo's files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Make a function that runs one training step and returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def time_alternately(steps: list[Callable[[], float]], rounds: int = 9) -> list[float]:
    """Take each step's median in seconds; in turns, as the machine's other work then hits all."""
    for step in steps:
        step()
    times = [[step() for step in steps] for _ in tqdm(range(rounds), desc="timing", unit="round")]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def write_table(rows: list[Row], seconds: float) -> None:
    headers = ("framework", "model", "parameters", "GFLOPs", "s/step", "AP", "AP50")
    table = tabulate(
        [asdict(row).values() for row in rows],
        headers,
        tablefmt="github",
        floatfmt=("", "", "", ".3f", ".3f", ".1f", ".1f"),
        intfmt=",",
        missingval="not trained",
    )
    processor = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} CPU cores"
    note = (
        f"Drawn scenes, {IMAGE_SIZE} px; box AP in percent on 100 val images. GFLOPs of one "
        f"{IMAGE_SIZE}x{IMAGE_SIZE} image with {PROPOSALS} proposals; s/step: median of a training "
        f"step, batch 8, {processor}.\nThe demo took {seconds / 60:.1f} minutes."
    )
    (OUT / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))
    (OUT / "results.md").write_text(f"{table}\n\n{note}\n")
    print(f"\n{table}\n\n{note}")
    print(f"Table: {OUT / 'results.md'}; pictures: {OUT}/pictures_*/ (ground truth, detections)")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
