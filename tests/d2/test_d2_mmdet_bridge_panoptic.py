"""Panoptic detectors of MMDetection as a meta-architecture of Detectron2."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

from bridged_detectors import (
    CROSS,
    SELF,
    STUFF,
    as_detectron2,
    losses_of,
    run_in_mmdetection,
    use,
    with_semantic,
)
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluators
from detectron2.modeling import build_model
from mmdet.datasets import CocoPanopticDataset

from d2_plugins.evaluation import build_evaluator
from d2_plugins.mmdet_bridge import MMDetDetector
from d2_plugins.panoptic_quality import PanopticQualityEvaluator


def test_panoptic_segments_are_those_of_mmdetection(cfg, packed):
    model = build_model(use(cfg, "maskformer")).eval()
    nn.init.normal_(model.detector.panoptic_head.cls_embed.weight, std=3)  # of several classes
    with torch.no_grad():
        expected = run_in_mmdetection(copy.deepcopy(model.detector), packed, training=False)
        outputs = model([as_detectron2(sample) for sample in packed])
    kinds = set()
    for output, sample in zip(outputs, expected, strict=True):
        segments, infos = output["panoptic_seg"]
        theirs = sample.pred_panoptic_seg.sem_seg[0]
        assert segments.shape == sample.ori_shape
        assert torch.equal(segments == 0, theirs % 1000 == 7 + STUFF)
        assert [info["id"] for info in infos] == list(range(1, len(theirs.unique()) + 1))[
            : len(infos)
        ]
        for info in infos:
            mask = segments == info["id"]
            (label,) = theirs[mask].unique().tolist()
            assert torch.equal(mask, theirs == label) and info["area"] == mask.sum()
            assert info["isthing"] == (label % 1000 < 7)
            kinds.add(info["isthing"])
    assert kinds == {True, False}


def test_panoptic_detr_is_that_of_mmdetection(cfg, packed):
    use(
        cfg,
        "detr",
        "model.type=PanopticDETR",
        "model.backbone.out_indices=(0,1,2,3)",
        *(f"{o}.embed_dims=128" for o in ("model.bbox_head", "model.panoptic_head")),
        *(f"model.encoder.layer_cfg.{part}.embed_dims=128" for part in (SELF, "ffn_cfg")),
        *(f"model.decoder.layer_cfg.{part}.embed_dims=128" for part in (SELF, CROSS, "ffn_cfg")),
        "model.neck.out_channels=128",
        "model.positional_encoding.num_feats=64",
        f"model.bbox_head.num_classes={7 + STUFF}",
        "model.panoptic_head.type=DETRPanopticHead",
        "model.panoptic_head.num_things_classes=7",
        f"model.panoptic_head.num_stuff_classes={STUFF}",
        "model.panoptic_head.in_channels=(8,16,32)",
        "model.test_cfg.score_thr=0.0",
        *(f"model.data_preprocessor.pad_{kind}=True" for kind in ("mask", "seg")),
        "model.data_preprocessor.seg_pad_value=255",
    )
    packed, inputs = with_semantic(packed, [as_detectron2(sample) for sample in packed])
    model = build_model(cfg).train()
    expected = run_in_mmdetection(copy.deepcopy(model.detector), packed, training=True)
    losses = losses_of(model, inputs)
    assert losses["loss_mask"] == expected["loss_mask"] > 0
    assert losses["loss_dice"] == expected["loss_dice"] > 0
    with torch.no_grad():
        expected = run_in_mmdetection(model.detector.eval(), packed, training=False)
        outputs = model.eval()(inputs)
    for output, sample in zip(outputs, expected, strict=True):
        segments, infos = output["panoptic_seg"]
        theirs = sample.pred_panoptic_seg.sem_seg[0]
        assert segments.shape == theirs.shape == sample.ori_shape
        assert len(infos) == len(theirs.unique()) > 0


def test_panoptic_segments_of_a_map_made_by_hand():
    detector = nn.Conv2d(1, 1, 1)
    detector.num_things_classes, detector.num_stuff_classes = 7, 6
    void, first, second, stuff = 13, 1002, 2002, 8
    labels = torch.tensor([[void, first, first], [stuff, second, stuff]])
    segments, infos = MMDetDetector(detector=detector)._unpack_panoptic(labels)
    by_id = {info.pop("id"): info for info in infos}
    assert [[by_id.get(i) for i in row] for row in segments.tolist()] == [
        [None, thing := {"isthing": True, "category_id": 2, "area": 2}, thing],
        [
            ground := {"isthing": False, "category_id": 2, "area": 2},
            {"isthing": True, "category_id": 2, "area": 1},
            ground,
        ],
    ]


def test_every_class_of_coco_gets_the_id_that_it_has_in_the_dataset():
    detector = nn.Conv2d(1, 1, 1)
    detector.num_things_classes, detector.num_stuff_classes = 80, 53
    model = MMDetDetector(detector=detector)
    evaluator = COCOPanopticEvaluator("coco_2017_val_panoptic_separated")
    _, infos = model._unpack_panoptic(torch.arange(133)[None])
    dataset_ids = [evaluator._convert_category_id(info)["category_id"] for info in infos]
    standard = _get_builtin_metadata("coco_panoptic_standard")
    things, stuff = (standard[f"{k}_dataset_id_to_contiguous_id"] for k in ("thing", "stuff"))
    places = {**stuff, **things}
    names = [standard["stuff_classes"][places[i]] for i in dataset_ids]
    assert names == list(CocoPanopticDataset.METAINFO["classes"])


def test_panoptic_detector_without_semantic_maps_says_what_to_train_on(cfg, packed):
    model = build_model(use(cfg, "maskformer"))
    with pytest.raises(ValueError, match="no 'sem_seg', .* 6 stuff classes; .*separated"):
        losses_of(model, [as_detectron2(packed[0])])


def test_panoptic_detector_is_not_asked_for_semantic_scores(cfg, registered, drawn_coco, tmp_path):
    ids = {f"{kind}_dataset_id_to_contiguous_id": {1: 0} for kind in ("thing", "stuff")}
    annotations = str(drawn_coco / "annotations/instances_val2017.json")
    register_coco_panoptic_separated("drawn", ids, "", "", "", "", annotations)
    use(cfg, "maskformer").OUTPUT_DIR = str(tmp_path)
    evaluator = build_evaluator(cfg, "drawn_separated")
    assert isinstance(evaluator, DatasetEvaluators)
    kinds = [type(part) for part in evaluator._evaluators]
    assert kinds == [COCOEvaluator, PanopticQualityEvaluator]
