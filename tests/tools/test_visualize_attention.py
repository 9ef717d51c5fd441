"""tools/visualize_attention.py: the pictures, by both frameworks, and each error."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import visualize_attention
from PIL import Image

from plugin_core import IDAClassifier
from plugin_core.inspection.attention_maps import (
    Caption,
    Detections,
    Detector,
    region_attention,
    run,
)
from plugin_core.inspection.choices import attention_names, choose_layers
from plugin_core.inspection.phrases import choose_grounder
from plugin_core.inspection.pictures import explain

ROOT = Path(__file__).resolve().parents[2]

D2_CONFIG = """
_BASE_: {root}/configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml
MODEL:
  RESNETS:
    PLUGINS:
      - {{NAME: triplet_attention, STAGES: [res2, res3, res4, res5]}}
      - {{NAME: ida, STAGES: [res5], NUM_QUERIES: 6, WARM_START: True}}
  RPN: {{POST_NMS_TOPK_TEST: 20}}
  ROI_HEADS: {{NAME: StandardPluginROIHeads, SCORE_THRESH_TEST: 0.0, NUM_CLASSES: {classes}}}
  ROI_BOX_HEAD: {{NAME: IDABoxHead, FC_DIM: 16}}
DATASETS: {{TEST: [{dataset}]}}
INPUT: {{MIN_SIZE_TEST: 72, MAX_SIZE_TEST: 72}}
"""
MM_CONFIG = """
_base_ = "{root}/configs/mm/synthetic/faster-rcnn_r18-triplet_fpn_synthetic.py"
triplet = dict(cfg=dict(type="TripletAttention", init="pytorch"), position="after_conv2")
ida = dict(
    cfg=dict(type="IDABlock", num_queries=6, warm_start=True),
    stages=(False, False, False, True),
    position="after_conv2",
)
bbox_head = dict(type="IDABBoxHead", fc_out_channels=16, num_classes={classes})
model = dict(
    backbone=dict(plugins=[triplet, ida]),
    roi_head=dict(bbox_head=bbox_head),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0)),
)
"""
DETR_CONFIG = """
_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
model = dict(
    num_queries=5,
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[512]),
    encoder=dict(num_layers=1),
    decoder=dict(num_layers=1),
    test_cfg=dict(max_per_img=5),
)
"""
RETINANET_CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512]),
    test_cfg=dict(score_thr=0.0, nms_pre=10, max_per_img=5),
)
"""
SMALL_PIPELINE = """
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(72, 72), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
test_dataloader = dict(dataset=dict(pipeline=pipeline))
"""
PICTURES = ["gradcam", "gradcam++", "triplet-hw", "ida-regions", "ida-queries", "attention"]


class Trained(NamedTuple):
    """A detector with random weights, whose least detections count."""

    side: str
    config: str
    weights: str
    backbone: str  # name of the ResNet
    stage: str  # name of its last but one stage

    def argv(self, *images: str, out: Path) -> list[str]:
        return [self.config, *images, "--weights", self.weights, "--out", str(out)]


@pytest.fixture(scope="session")
def class_names(drawn_coco: Path) -> list[str]:
    content = json.loads((drawn_coco / "annotations/instances_val2017.json").read_text())
    return [category["name"] for category in content["categories"]]


@pytest.fixture(scope="session")
def images(drawn_coco: Path) -> list[str]:
    return sorted(map(str, (drawn_coco / "val2017").glob("*.jpg")))


@pytest.fixture(scope="session")
def detectron2(tmp_path_factory, drawn_coco, class_names) -> Iterator[Trained]:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.data import DatasetCatalog
    from detectron2.modeling import build_model

    from d2_plugins.analysis import load_config

    folder, dataset = tmp_path_factory.mktemp("d2"), "visualized_val"
    config, weights = folder / "config.yaml", folder / "model.pth"
    config.write_text(D2_CONFIG.format(root=ROOT, classes=len(class_names), dataset=dataset))
    cfg: Any = load_config(str(config))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    json_file = drawn_coco / "annotations/instances_val2017.json"
    visualize_attention.register([(dataset, str(json_file), str(drawn_coco))], "d2_plugins")
    resnet = "backbone.bottom_up"
    yield Trained("d2_plugins", str(config), str(weights), resnet, f"{resnet}.res4")
    DatasetCatalog.remove(dataset)


@pytest.fixture(scope="session")
def mmdetection(tmp_path_factory, class_names) -> Trained:
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    config = tmp_path_factory.mktemp("mm") / "config.py"
    config.write_text(MM_CONFIG.format(root=ROOT, classes=len(class_names)))
    weights = random_mmdet_weights(config, {"dataset_meta": {"classes": class_names}})
    return Trained("mm_plugins", str(config), weights, "backbone", "backbone.layer3")


def random_mmdet_weights(config: Path, meta: dict[str, Any]) -> str:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    from mm_plugins.analysis import load_config

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(load_config(str(config)).model)
    weights = config.with_name("model.pth")
    torch.save({"state_dict": model.state_dict(), "meta": meta}, weights)
    return str(weights)


@pytest.fixture(params=["detectron2", "mmdetection"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)


load = functools.cache(visualize_attention.load)


@pytest.fixture(autouse=True)
def _load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualize_attention, "load", load)


@pytest.fixture
def detector(trained: Trained) -> Detector:
    return load(trained.side, trained.config, trained.weights, False)


def error_of(*argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        visualize_attention.main(argv)
    message = stop.value.code  # a text: printed to stderr, exit status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


# ------------------------------------------------------------------------- with the frameworks


def test_sheet_and_pictures_of_everything_are_written(trained, images, tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    visualize_attention.main(trained.argv(images[0], out=out))
    stem, size = Path(images[0]).stem, Image.open(images[0]).size
    assert sorted(os.listdir(out)) == sorted(f"{stem}_{what}.png" for what in PICTURES)
    for what in PICTURES[:-1]:
        assert Image.open(out / f"{stem}_{what}.png").size == size
    assert f"1 of 1 images: {out}/*_attention.png" in capsys.readouterr().out


def test_every_row_is_of_the_last_layer_and_the_class_is_named(detector, images, class_names):
    layers = choose_layers(detector, None, [])
    rows = explain(detector, images[0], None, layers, warn=pytest.fail)
    assert rows[0].panels[0].title.split(",")[0] in class_names
    last = detector.last_stage()
    # With these random weights it may be nowhere above 0.
    assert re.fullmatch(rf"Grad-CAM(, .+)?\n{re.escape(last)}", rows[0].panels[1].title)
    names = [row.title.splitlines()[1] for row in rows[1:]]
    assert names[0].startswith(f"{last}.1.") and names[1].startswith(f"{last}.1.")
    triplet, ida, regions = map(detector.model.get_submodule, names)
    assert (triplet.plugin_name, ida.plugin_name) == ("triplet_attention", "ida")
    assert isinstance(regions, IDAClassifier)
    assert [len(row.panels) for row in rows] == [3, 3, 4, 5]
    hooks = [h for m in detector.model.modules() for h in m._forward_hooks.values()]
    assert hooks == []


def test_region_is_the_one_that_the_detection_was_made_from(detector, images):
    (name,) = attention_names(detector)["ida-regions"]
    classifier = detector.model.get_submodule(name)
    done = run(detector, detector.read(images[0]), [classifier])
    index = done.detections.best()
    maps, region = region_attention(detector, done, classifier, index)
    assert maps.shape == (4, 7, 7)
    pooled = [call for call in done.calls if call.module in detector.region_extractors()]
    regions = detector.regions(pooled[-1])
    assert regions.shape == (20, 4)
    probability = done.call_of(classifier).output.softmax(1)[:, done.detections.classes[index]]
    nearest = (probability - done.detections.scores[index]).abs().argmin()
    assert torch.equal(region, regions[nearest])


def test_layer_of_grad_cam_can_be_chosen(trained, images, tmp_path, monkeypatch):
    rows: list[Any] = []
    monkeypatch.setattr(visualize_attention, "write", lambda r, *_: rows.extend(r))
    argv = [*trained.argv(images[0], out=tmp_path), "--layer", trained.stage]
    visualize_attention.main([*argv, "--methods", "gradcam"])
    assert [p.title for p in rows[0].panels[1:]] == [f"Grad-CAM\n{trained.stage}"]


def test_baseline_has_the_same_grad_cams_in_a_row_of_its_own(trained, images, tmp_path):
    # Of the same detector, so that both are equal
    argv = [*trained.argv(images[0], out=tmp_path), "--methods", "gradcam"]
    visualize_attention.main([*argv, "--baseline", trained.config, trained.weights])
    stem = Path(images[0]).stem
    names = ["attention", "baseline_gradcam", "gradcam"]
    assert sorted(os.listdir(tmp_path)) == [f"{stem}_{name}.png" for name in names]
    first, second = (np.asarray(Image.open(tmp_path / f"{stem}_{n}.png")) for n in names[1:])
    assert np.array_equal(first, second)


def test_image_without_the_class_is_a_warning_and_none_with_it_an_error(
    trained, detector, images, tmp_path, capsys, monkeypatch
):
    kind = type(detector)
    read, detect = kind.read, kind.detect
    first = Path(images[0]).stem

    def read_noting(self, path):
        self.finds = Path(path).stem == first
        return read(self, path)

    def detect_in_first(self, *args):
        found = detect(self, *args)
        kept = found.scores >= (0 if self.finds else 2)
        return Detections(found.boxes[kept], found.scores[kept], found.classes[kept])

    monkeypatch.setattr(kind, "read", read_noting)
    monkeypatch.setattr(kind, "detect", detect_in_first)
    argv = ["--methods", "triplet"]
    visualize_attention.main([*trained.argv(*images[:2], out=tmp_path), *argv])
    assert f"warning: {images[1]}: no detection above the score" in capsys.readouterr().err
    assert {name.partition("_")[0] for name in os.listdir(tmp_path)} == {first}
    assert "no picture was made" in error_of(*trained.argv(images[1], out=tmp_path), *argv)


def test_weights_without_the_attention_are_an_error(trained, images, tmp_path):
    content = torch.load(trained.weights)
    key = "model" if "model" in content else "state_dict"
    content[key] = {k: v for k, v in content[key].items() if "triplet" not in k}
    torch.save(content, tmp_path / "plain.pth")
    argv = trained._replace(weights=str(tmp_path / "plain.pth")).argv(images[0], out=tmp_path / "x")
    message = error_of(*argv)
    assert "plain.pth' lacks" in message and "triplet_attention" in message
    assert not (tmp_path / "x").exists()


def test_missing_weights_are_an_error(trained, images, tmp_path):
    argv = trained._replace(weights="nowhere.pth").argv(images[0], out=tmp_path)
    assert "there is no checkpoint 'nowhere.pth'" in error_of(*argv)


def test_unknown_class_is_an_error_with_the_likely_ones(trained, images, tmp_path, class_names):
    argv = trained.argv(images[0], out=tmp_path)
    assert class_names[0] in error_of(*argv, "--class", class_names[0][:-1])
    last = len(class_names) - 1
    assert f"has {last + 1} classes, 0 … {last}" in error_of(*argv, "--class", str(last + 1))


def test_unknown_layer_is_an_error_that_lists_the_attention(trained, images, tmp_path):
    message = error_of(*trained.argv(images[0], out=tmp_path), "--layer", "ida")
    assert "--layer ida: the model has no such module" in message
    assert f"{trained.backbone}." in message and "triplet_attention" in message


def test_layer_that_puts_out_no_map_of_the_image_is_reported(trained, images, tmp_path, capsys):
    name = "roi_heads.box_head" if trained.side == "d2_plugins" else "roi_head.bbox_head"
    argv = [*trained.argv(images[0], out=tmp_path), "--methods", "gradcam", "--layer", name]
    assert "no picture was made" in error_of(*argv)
    assert f"layer {name}: it puts out tuple, expected a feature map" in capsys.readouterr().err


def test_detector_with_classes_reads_no_text(detector):
    kind = type(detector.model).__name__
    with pytest.raises(ValueError, match=f"--phrase: {kind} reads no text; choose by --class"):
        choose_grounder(detector, Caption(("red",)), None)


@pytest.mark.parametrize("config", [DETR_CONFIG, RETINANET_CONFIG], ids=["detr", "retinanet"])
def test_mmdetection_without_regions_has_grad_cams(config, tmp_path, images):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    file = tmp_path / "config.py"
    file.write_text(config + SMALL_PIPELINE)
    weights = random_mmdet_weights(file, {})
    argv = [str(file), images[0], "--weights", weights, "--out", str(tmp_path / "out")]
    visualize_attention.main([*argv, "--methods", "gradcam"])
    assert len(os.listdir(tmp_path / "out")) == 2
    message = error_of(*argv, "--methods", "ida-regions")
    assert "has no IDAClassifier for it; there are gradcam, gradcam++" in message


def test_names_of_classes_are_the_files_where_their_number_is_the_models():
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmengine.config import Config

    from mm_plugins import visualization

    panoptic = SimpleNamespace(model=SimpleNamespace(num_things_classes=2))
    for names, expected in ((("a", "b"), ("a", "b")), (("a", "b", "c"), ("0", "1"))):
        content = {"meta": {"dataset_meta": {"classes": names}}}
        cfg = Config({"test_dataloader": {"dataset": {"type": "CocoPanopticDataset"}}})
        found = visualization.MMDetDetector._names_of_classes(panoptic, cfg, content)
        assert found == expected


# ------------------------------------------------------------------------------------------- errors


@pytest.fixture
def yaml(tmp_path: Path) -> str:
    (tmp_path / "some.yaml").touch()
    return str(tmp_path / "some.yaml")


def argv_of(yaml: str, *images: str) -> list[str]:
    return [yaml, *images, "--weights", "w.pth", "--out", "nowhere"]


def test_image_that_is_not_there_or_is_broken_is_an_error(yaml, images, tmp_path):
    assert "there is no image 'nowhere.jpg'" in error_of(*argv_of(yaml, images[0], "nowhere.jpg"))
    (tmp_path / "cut.jpg").write_bytes(Path(images[0]).read_bytes()[:500])
    assert "cut.jpg' cannot be read" in error_of(*argv_of(yaml, str(tmp_path / "cut.jpg")))


def test_images_of_one_name_are_an_error(yaml, images, tmp_path):
    same = tmp_path / Path(images[0]).name
    same.write_bytes(Path(images[0]).read_bytes())
    assert "their pictures would have one name" in error_of(*argv_of(yaml, images[0], str(same)))


def test_baseline_of_another_framework_is_an_error(yaml, images):
    message = error_of(*argv_of(yaml, images[0]), "--baseline", "mmdet::x.py", "y.pth")
    assert "mmdet::x.py: a config of MMDetection" in message and "one of Detectron2" in message


def test_dataset_of_detectron2_is_not_registered_for_mmdetection(images):
    argv = argv_of("mmdet::x.py", images[0])
    assert "--register-coco: of Detectron2" in error_of(*argv, "--register-coco", "a", "b", "c")


def test_config_that_runs_a_detector_of_mmdetection_is_an_error_that_names_its_own(images):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    yaml = str(ROOT / "configs/d2/MMDet-Detection/atss_R_50_FPN_1x.yaml")
    message = error_of(*argv_of(yaml, images[0]))
    assert "use its own config" in message and "'mmdet::atss/atss_r50_fpn_1x_coco.py'" in message
