"""Data that real people have, in Detectron2: the right value, or a clear error beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import hard_inputs
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from d2_plugins.datasets import prepare, register_coco
from plugin_core.datasets.check import Reads, Use

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hard_inputs.damage_all(tmp_path_factory.mktemp("damaged"))


def register(folder: Path, *, classes: int = 4, masks: str = "", keypoints: int = 0) -> None:
    for split in ("train", "val"):
        annotations = folder / "annotations" / f"instances_{split}2017.json"
        register_coco(f"hard_{split}", str(annotations), str(folder / f"{split}2017"))
    use = Use("train", masks, keypoints)
    prepare(
        [("DATASETS.TRAIN", "hard_train")],
        [("DATASETS.TEST", "hard_val")],
        Reads(use, heads=[("MODEL.ROI_HEADS.NUM_CLASSES", classes)]),
    )


def average_precision(folder: Path, moved: float = 0.0) -> float:
    """Evaluate detections that are right in image and class, and in box unless it is moved."""
    evaluator = COCOEvaluator("hard_val", ("bbox",), False, use_fast_impl=False)
    truth = hard_inputs.truth(folder, MetadataCatalog.get("hard_train").thing_classes)
    evaluator.reset()
    for image in DatasetCatalog.get("hard_val"):
        mine = [t for t in truth if t["image_id"] == image["image_id"]]
        boxes = torch.tensor([t["box"] for t in mine]).reshape(-1, 4)
        boxes[:, ::2] += moved
        found = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes))
        found.scores = torch.ones(len(mine))
        found.pred_classes = torch.tensor([t["label"] for t in mine], dtype=torch.long)
        evaluator.process([image], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("case", hard_inputs.RIGHT)
def test_what_can_be_read_in_one_way_is_read_so(damaged, case):
    folder = damaged / case
    register(folder)
    assert set(MetadataCatalog.get("hard_train").thing_classes) == set(hard_inputs.NAMES)
    mapper = DatasetMapper(get_cfg(), is_train=True)
    for image in DatasetCatalog.get("hard_train")[:3]:
        mapper(image)
    assert average_precision(folder) == pytest.approx(100)


@pytest.mark.parametrize("case", hard_inputs.ERRORS)
def test_what_would_train_something_wrong_is_an_error(damaged, case):
    with pytest.raises(ValueError) as error:
        register(damaged / case)
    message = " ".join(str(error.value).split())
    assert hard_inputs.ERRORS[case] in message and len(message) < 4000


@pytest.mark.parametrize("moved", [0, 3])
def test_subset_in_no_order_without_objects_of_a_class_is_evaluated_as_by_pycocotools(
    tmp_path, moved
):
    folder = hard_inputs.odd_test_set(tmp_path / "odd")
    register(folder)
    wanted = 100 * hard_inputs.pycocotools_says(folder, moved)
    assert average_precision(folder, moved) == pytest.approx(wanted) and wanted > 1


def test_boxes_that_detectron2_drops_are_a_warning(damaged, capsys):
    register(damaged / "bad_boxes")
    said = " ".join(capsys.readouterr().err.split())
    for what in ("negative width", "no width or height", "outside of their image", "reach out of"):
        assert what in said


@pytest.mark.parametrize(
    ("case", "reads", "said"),
    [
        ("sixteen_bit", {}, "sees nearly all pixels white"),
        ("mixed_segm", {"masks": "polygon"}, "13 × annotations without a mask"),
        ("rle_segm", {"masks": "polygon"}, "et INPUT.MASK_FORMAT to 'bitmask'"),
        ("no_info", {"classes": 3}, "NUM_CLASSES: the model has 3 classes, but the data has 4"),
        ("no_info", {"classes": 80}, "the model has 80 classes, but the data has 4 ('person', "),
        ("triangles", {}, "but the data has 5"),
        ("keypoints5", {"classes": 1, "keypoints": 17}, "are 5, but the model's are 17"),
    ],
)
def test_data_that_the_config_does_not_fit_is_an_error(damaged, case, reads, said):
    with pytest.raises(ValueError) as error:
        register(damaged / case, **reads)
    assert said in " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("case", "reads"),
    [
        ("rle_segm", {"masks": "bitmask"}),
        ("keypoints5", {"classes": 1, "keypoints": 5}),
        ("odd_names", {}),
        ("val_empty", {}),
    ],
)
def test_unusual_data_is_accepted(damaged, case, reads):
    register(damaged / case, **reads)
    assert DatasetCatalog.get("hard_train") and DatasetCatalog.get("hard_val")


def test_test_set_of_fewer_categories_is_evaluated_on_those(damaged, capsys):
    register(damaged / "val_fewer_categories")
    assert "'square'; 'triangle'" in " ".join(capsys.readouterr().err.split())
    classes = MetadataCatalog.get("hard_val").thing_dataset_id_to_contiguous_id
    assert sorted(classes.values()) == [0, 1, 2, 3]
    assert average_precision(damaged / "val_fewer_categories") == pytest.approx(100)


def test_two_training_sets_that_number_their_classes_differently_are_one(damaged):
    folder = damaged / "val_other_ids"
    register(folder)
    prepare(
        [("DATASETS.TRAIN", "hard_train"), ("DATASETS.TRAIN", "hard_val")],
        [],
        Reads(Use("train", keeps_empty=True)),
    )
    labels = [a["category_id"] for i in DatasetCatalog.get("hard_val") for a in i["annotations"]]
    assert sorted(labels) == sorted(t["label"] for t in hard_inputs.truth(folder))
