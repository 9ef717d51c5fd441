"""Every config under configs/d2 builds, trains a step and evaluates, shrunk by overrides only."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image

from d2_plugins import merge_config
from d2_plugins.config import load_lazy_config
from d2_plugins.datasets import register_coco
from d2_plugins.mmdet_bridge import load_config as load_mmdet_config
from d2_plugins.trainer import PluginTrainer
from plugin_core import BatchFormer, BlockPlugin, IDABlock, IDAClassifier, TripletAttention

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "d2"
DRAWN = CONFIGS / "Synthetic-Detection"  # start from random weights
YAML = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != DRAWN)
LAZY = sorted(CONFIGS.rglob("*.py"))
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MAX_SIZE_TRAIN": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": (),
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "SEED": 0,
}
SMALL_DETECTOR = [
    "model.backbone.init_cfg=None",
    "model.backbone.base_channels=16",
    "model.bbox_head.num_classes=7",
]
SMALL_DETR = [
    *("model.num_queries=20", "model.test_cfg.max_per_img=5"),
    *("model.encoder.num_layers=2", "model.decoder.num_layers=2"),
]
BOXES = {"AP", "AP50", "AP75", "APs", "APm", "APl"}
UNHEARD = "hw.conv.conv.weight"  # of a gate whose norm begins at 0
HEAD = {f"head.{i}.weight" for i in range(4)}  # the classes' weights in IDA's classifier
METRICS = {"bbox": BOXES, "segm": BOXES, "keypoints": BOXES - {"APs"}}  # of the paper's tables


@pytest.fixture
def drawn(drawn_coco, registered, tmp_path) -> str:
    """Registers drawn_{train,val}, persons_{train,val} and panoptic_train."""
    annotations = drawn_coco / "annotations"
    for split in ("train", "val"):
        images = drawn_coco / f"{split}2017"
        for name, kind in (("drawn", "instances"), ("persons", "person_keypoints")):
            register_coco(f"{name}_{split}", f"{annotations}/{kind}_{split}2017.json", str(images))
    semantic = write_semantic_maps(annotations, tmp_path / "semantic")
    register_coco_panoptic_separated(
        "panoptic",
        {},
        str(drawn_coco / "train2017"),
        str(annotations / "panoptic_train2017"),
        str(annotations / "panoptic_train2017.json"),
        str(semantic),
        str(annotations / "instances_train2017.json"),
    )
    return "drawn"


def write_semantic_maps(annotations: Path, folder: Path) -> Path:
    """Maps of stuff classes, 1 to 6, with all things as 0, as Panoptic FPN trains on."""
    folder.mkdir()
    panoptic = json.loads((annotations / "panoptic_train2017.json").read_text())
    stuff = [c["id"] for c in panoptic["categories"] if not c["isthing"]]
    for record in panoptic["annotations"]:
        colours = Image.open(annotations / "panoptic_train2017" / record["file_name"])
        ids = np.asarray(colours, dtype=np.int64) @ [1, 256, 256**2]
        semantic = np.full(ids.shape, 255, dtype=np.uint8)
        for segment in record["segments_info"]:
            category = segment["category_id"]
            label = stuff.index(category) + 1 if category in stuff else 0
            semantic[ids == segment["id"]] = label
        Image.fromarray(semantic).save(folder / record["file_name"])
    return folder


def shrink(cfg: CfgNode, path: Path, output: Path) -> CfgNode:
    merge_config(cfg, str(path))
    cfg.merge_from_list([part for pair in SMALL.items() for part in pair])
    cfg.OUTPUT_DIR = str(output)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 7
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("drawn_train",), ("drawn_val",)
    if cfg.MODEL.KEYPOINT_ON:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("persons_train",), ("persons_val",)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
        cfg.DATASETS.TRAIN = ("panoptic_separated",)
    if cfg.MODEL.META_ARCHITECTURE == "MMDetDetector":
        cfg.MODEL.MMDET.OVERRIDES += SMALL_DETECTOR
        model = load_mmdet_config(cfg.MODEL.MMDET.CONFIG, []).model
        channels = [wide // 4 for wide in model.neck.in_channels]  # of 64 base channels
        cfg.MODEL.MMDET.OVERRIDES.append(f"model.neck.in_channels={channels}".replace(" ", ""))
        if cfg.SOLVER.OPTIMIZER == "ADAMW":
            cfg.MODEL.MMDET.OVERRIDES += SMALL_DETR
    return cfg


def tasks(cfg: CfgNode) -> set[str]:
    return {
        "bbox",
        *(["segm"] if cfg.MODEL.MASK_ON else []),
        *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else []),
    }


@pytest.mark.parametrize("path", YAML, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_config_trains_a_step_and_evaluates(cfg, path, drawn, tmp_path):
    cfg = shrink(cfg, path, tmp_path / "output")
    if any(plugin["NAME"].startswith("timm:") for plugin in cfg.MODEL.RESNETS.PLUGINS):
        pytest.importorskip("timm", reason="timm is not installed")
    trainer = PluginTrainer(cfg)
    trainer.train()
    results = trainer._last_eval_results
    losses = [json.loads(line) for line in (tmp_path / "output/metrics.json").open()][0]
    assert math.isfinite(losses["total_loss"])
    assert set(results) == tasks(cfg)
    assert all(METRICS[task] <= set(results[task]) for task in results)
    modules = list(trainer.model.modules())
    triplet = [m for m in modules if isinstance(m, TripletAttention)]
    blocks = [m for m in modules if isinstance(m, IDABlock)]
    heads = [m for m in modules if isinstance(m, IDAClassifier)]
    batchformers = [m for m in modules if isinstance(m, BatchFormer)]
    if cfg.MODEL.META_ARCHITECTURE == "MMDetDetector":
        assert len(batchformers) == ("batchformer" in path.name)
        assert all(p.grad.any() for m in batchformers for p in m.parameters())
        return
    inside = {18: 8, 50: 16, 101: 33}[cfg.MODEL.RESNETS.DEPTH]
    assert len(triplet) == (inside if "triplet" in path.name else 0)
    assert len(blocks) == (2 if "_IDA_FPN" in path.name else 0)  # the last of two stages
    cascade = cfg.MODEL.ROI_HEADS.NAME.startswith("Cascade")
    assert len(heads) == ((3 if cascade else 1) if "_IDA_head" in path.name else 0)
    assert len(batchformers) == ((3 if cascade else 1) if "_batchformer" in path.name else 0)
    # What starts as the identity is let in by a factor, which learns from the first step on.
    factors = [m.alpha for m in modules if getattr(m, "alpha", None) is not None]
    amc = {name for name in losses if name.startswith("loss_amc_")}
    assert amc == ({"loss_amc_mean", "loss_amc_max"} if "_AMC_" in path.name else set())
    cold = [] if factors else triplet  # of a backbone that was pretrained with it
    assert bool(cold) == ("_published" in path.name)
    assert factors or heads or batchformers or amc or cold
    learning = [p for m in cold for name, p in m.named_parameters() if name != UNHEARD]
    assert all(p.grad.abs().max() > 0 for p in learning)
    assert all(factor.grad.abs() > 0 and factor != 0 for factor in factors)
    assert all(p.grad.abs().max() > 0 for m in heads for n, p in m.named_parameters() if n in HEAD)
    assert all(p.grad.abs().max() > 0 for m in batchformers for p in m.parameters())


@pytest.mark.parametrize("path", LAZY, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_shipped_lazy_config_trains_all_of_its_attention(path):
    with torch.device("meta"):
        model = instantiate(load_lazy_config(str(path)).model)
    parameters = {n: p for n, p in model.named_parameters() if ".triplet_attention." in n}
    assert parameters and all(p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("path", LAZY, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_lazy_config_trains_a_step_and_evaluates(path, drawn):
    cfg = load_lazy_config(str(path))
    cfg.model.backbone.bottom_up.freeze_at = 0
    cfg.model.backbone.bottom_up.stem.norm = cfg.model.backbone.bottom_up.stages.norm = "BN"
    cfg.model.roi_heads.num_classes = 7
    cfg.model.roi_heads.box_head.fc_dims = [16, 1024]
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    cfg.model.roi_heads.box_predictor.test_topk_per_image = 5
    cfg.model.proposal_generator.pre_nms_topk = (50, 50)
    cfg.model.proposal_generator.post_nms_topk = (30, 10)
    for part, names, size in (("train", "drawn_train", (64,)), ("test", "drawn_val", 64)):
        loader = cfg.dataloader[part]
        loader.dataset.names, loader.num_workers = names, 0
        loader.mapper.augmentations[0].short_edge_length = size
    cfg.dataloader.train.total_batch_size = 2
    cfg.dataloader.evaluator.output_dir = None
    model = instantiate(cfg.model)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    cfg.optimizer.params.model, cfg.optimizer.lr = model, 1e-4
    optimizer = instantiate(cfg.optimizer)
    with EventStorage():
        loss = sum(model.train()(batch).values())
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    attention = [m for m in model.modules() if isinstance(m, TripletAttention)]
    assert len(attention) == 16
    plugins = [m for m in model.modules() if isinstance(m, BlockPlugin)]
    assert len(plugins) == 16 and all(m.alpha.grad.abs() > 0 for m in plugins)
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    assert set(results) == {"bbox", *(["segm"] if "mask_head" in cfg.model.roi_heads else [])}


def test_panoptic_config_segments_every_pixel(cfg, drawn, tmp_path):
    path = CONFIGS / "COCO-PanopticSegmentation/panoptic_fpn_R_50_triplet_1x.yaml"
    model = build_model(shrink(cfg, path, tmp_path)).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 64, 64)}])
    segments, _ = output["panoptic_seg"]
    assert segments.shape == (64, 64) and output["sem_seg"].shape == (7, 64, 64)


@pytest.mark.parametrize("path", YAML, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_pixels_and_strides_are_those_of_the_weights(cfg, path):
    merge_config(cfg, str(path))
    torchvision = "torchvision" in cfg.MODEL.WEIGHTS or "_published" in path.name
    assert torchvision == (cfg.INPUT.FORMAT == "RGB")
    assert torchvision == (cfg.MODEL.PIXEL_STD[0] > 50)
    assert torchvision == (cfg.MODEL.PIXEL_MEAN[0] > cfg.MODEL.PIXEL_MEAN[2])
    assert torchvision != cfg.MODEL.RESNETS.STRIDE_IN_1X1
