"""The drawn dataset: COCO's layout, and annotations that are true."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import synthetic_coco.annotations
import synthetic_coco.scene
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from synthetic_coco import Settings, companions, image_generator, render, sample_scene
from synthetic_coco.annotations import instance_records, keypoint_records
from synthetic_coco.scene import MIN_VISIBLE
from synthetic_coco_cases import annotations_of, make, tree_digest

SIZE = 96
COUNTS = {"train": 24, "val": 12}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "coco", **COUNTS, size=SIZE, seed=7)


@pytest.fixture(scope="module")
def drawn() -> list:
    """(scene, rendering) of 30 images of 128 pixels."""
    pairs = []
    for index in range(30):
        rng = image_generator(3, "train", index)
        scene = sample_scene(rng, "train", Settings())
        pairs.append((scene, render(scene, 128, rng)))
    return pairs


# The files


def test_layout_is_that_of_coco_2017(dataset: Path) -> None:
    names = ("instances", "person_keypoints", "panoptic", "captions")
    expected = {f"annotations/{name}_{split}2017.json" for name in names for split in COUNTS}
    expected |= {
        f"annotations/grounding_{split}2017_{name}"
        for name in ("odvg.jsonl", "flickr30k.json", "refcoco.json")
        for split in COUNTS
    }
    expected.add("annotations/synthetic_coco.json")
    for split, first in (("train", 1), ("val", 500001)):
        for image_id in range(first, first + COUNTS[split]):
            expected.add(f"{split}2017/{image_id:012d}.jpg")
            expected.add(f"annotations/panoptic_{split}2017/{image_id:012d}.png")
    assert set(tree_digest(dataset)) == expected


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("name", ["instances", "person_keypoints", "captions", "panoptic"])
def test_images_are_listed_with_their_true_size(dataset: Path, name: str, split: str) -> None:
    content = annotations_of(dataset, f"{name}_{split}")
    assert {"info", "licenses", "images", "annotations"} <= content.keys()
    assert len(content["images"]) == COUNTS[split]
    for record in content["images"]:
        with Image.open(dataset / f"{split}2017" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
            assert image.mode == "RGB"
        assert max(image.size) == SIZE
        assert min(image.size) >= 0.75 * SIZE - 1


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("name", ["instances", "person_keypoints", "captions"])
def test_pycocotools_reads_each_file(dataset: Path, name: str, split: str) -> None:
    coco = COCO(dataset / f"annotations/{name}_{split}2017.json")
    assert len(coco.imgs) == COUNTS[split]
    assert len(coco.anns) == len(coco.dataset["annotations"]) > 0  # the ids differ
    assert {ann["image_id"] for ann in coco.anns.values()} <= coco.imgs.keys()


def test_image_and_annotation_ids_are_unique_across_splits(dataset: Path) -> None:
    for key in ("images", "annotations"):
        ids = [
            record["id"]
            for split in COUNTS
            for record in annotations_of(dataset, f"instances_{split}")[key]
        ]
        assert len(ids) == len(set(ids))


def test_categories_start_with_person_and_carry_cocos_keypoints(dataset: Path) -> None:
    things = annotations_of(dataset, "instances_train")["categories"]
    assert [(c["id"], c["name"]) for c in things][:2] == [(1, "person"), (2, "disk")]
    assert [c["id"] for c in things] == list(range(1, 8))
    (person,) = annotations_of(dataset, "person_keypoints_val")["categories"]
    assert person["id"] == 1
    assert person["keypoints"][0] == "nose"
    assert len(person["keypoints"]) == 17
    assert len(person["skeleton"]) == 19
    panoptic = annotations_of(dataset, "panoptic_train")["categories"]
    assert [c["id"] for c in panoptic if c["isthing"]] == list(range(1, 8))
    assert all(len(c["color"]) == 3 for c in panoptic)


def test_captions_name_every_object(dataset: Path) -> None:
    coco = COCO(dataset / "annotations/instances_train2017.json")
    captions = annotations_of(dataset, "captions_train")["annotations"]
    for image_id in coco.imgs:
        sentences = [c["caption"] for c in captions if c["image_id"] == image_id]
        assert len(sentences) == 5
        assert all(s[0].isupper() and s.endswith(".") for s in sentences)
        for ann in coco.loadAnns(coco.getAnnIds(image_id)):
            name = coco.cats[ann["category_id"]]["name"]
            assert any(name in sentence for sentence in sentences)


def test_context_bias_file_holds_the_pairs(tmp_path: Path, dataset: Path) -> None:
    content = json.loads(
        (make(tmp_path / "coco", context_bias=0.75) / "annotations/context_bias.json").read_text()
    )
    pairs = {p["category_id"]: p["companion_id"] for p in content["companions"]}
    assert pairs == companions(7)
    assert content["probability"] == {"train": 0.75, "val": 0.25}
    assert not (dataset / "annotations/context_bias.json").exists()


# What the annotations say against what is drawn


def test_polygons_are_the_visible_masks(drawn: list) -> None:
    for scene, rendering in drawn:
        height, width = rendering.things.shape
        records = instance_records(scene, rendering, 1)
        assert len(records) == len(scene.things)
        for number, record in enumerate(records, start=1):
            assert all(len(p) >= 6 and len(p) % 2 == 0 for p in record["segmentation"])
            rles = coco_mask.frPyObjects(record["segmentation"], height, width)
            mask = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
            seen = rendering.things == number
            assert (mask & seen).sum() / (mask | seen).sum() > 0.93
            assert record["area"] == pytest.approx(seen.sum(), rel=0.05)


def test_boxes_are_the_extent_of_the_polygons_inside_the_image(dataset: Path) -> None:
    coco = COCO(dataset / "annotations/instances_train2017.json")
    for ann in coco.anns.values():
        image = coco.imgs[ann["image_id"]]
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in ann["segmentation"]])
        x, y, w, h = ann["bbox"]
        assert [x, y] == points.min(axis=0).tolist()
        assert [x + w, y + h] == points.max(axis=0).tolist()
        assert 0 <= x < x + w <= image["width"]
        assert 0 <= y < y + h <= image["height"]
        assert 0 < ann["area"] <= w * h
        assert ann["iscrowd"] == 0


def test_a_ring_is_cut_so_that_its_polygons_leave_the_hole_open() -> None:
    mask = np.zeros((80, 80), bool)
    mask[8:72, 8:72] = True
    mask[24:56, 24:56] = False
    polygons = synthetic_coco.annotations.visible_polygons(mask)
    rles = coco_mask.frPyObjects([p.ravel().tolist() for p in polygons], 20, 20)
    expected = mask[::4, ::4]
    assert (coco_mask.decode(coco_mask.merge(rles)).astype(bool) == expected).all()


def test_an_object_split_by_an_occluder_has_a_polygon_for_each_side() -> None:
    mask = np.zeros((40, 80), bool)
    mask[8:32, 8:72] = True
    mask[:, 32:40] = False
    polygons = synthetic_coco.annotations.visible_polygons(mask)
    assert [(p.min(axis=0).tolist(), p.max(axis=0).tolist()) for p in polygons] == [
        ([10, 2], [18, 8]),
        ([2, 2], [8, 8]),
    ]


def test_every_object_is_mostly_visible_and_readable(drawn: list) -> None:
    for scene, rendering in drawn:
        assert 1 <= len(scene.things) <= 4
        for number, thing in enumerate(scene.things, start=1):
            whole = sample_alone(thing, scene)
            seen = (rendering.things == number).sum()
            assert seen >= (MIN_VISIBLE - 0.05) * whole
            assert 0.19 <= thing.side <= 0.59


def sample_alone(thing: object, scene: object) -> int:
    """Pixels of an object at 128 with nothing in front of it."""
    alone = type(scene)(scene.aspect, scene.stuff, scene.horizon, (thing,))
    return int(render(alone, 128, np.random.default_rng(0)).things.sum())


def test_objects_stand_out_from_the_ground(drawn: list) -> None:
    for scene, rendering in drawn:
        image = rendering.image.astype(float)
        ground = image[rendering.things == 0].mean(axis=0)
        for number in range(1, len(scene.things) + 1):
            pixels = image[rendering.things == number]
            assert np.linalg.norm(pixels - ground, axis=1).mean() > 40


@pytest.mark.parametrize("split", COUNTS)
def test_panoptic_png_and_segments_agree_and_cover_the_image(dataset: Path, split: str) -> None:
    content = annotations_of(dataset, f"panoptic_{split}")
    categories = {c["id"]: c for c in content["categories"]}
    instances = COCO(dataset / f"annotations/instances_{split}2017.json")
    for record in content["annotations"]:
        png = Image.open(dataset / f"annotations/panoptic_{split}2017" / record["file_name"])
        ids = np.asarray(png).astype(int) @ [1, 256, 256**2]
        segments = {segment["id"]: segment for segment in record["segments_info"]}
        assert len(segments) == len(record["segments_info"])
        assert set(np.unique(ids)) == set(segments)  # one to one, and 0 (void) nowhere
        for segment_id, segment in segments.items():
            rows, columns = np.nonzero(ids == segment_id)
            assert segment["area"] == len(rows)
            low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
            assert segment["bbox"] == [*low, *np.subtract(high, low)]
        anns = instances.loadAnns(instances.getAnnIds(record["image_id"]))
        things = [s["category_id"] for s in segments.values() if _is_thing(s, categories)]
        assert Counter(things) == Counter(ann["category_id"] for ann in anns)


def _is_thing(segment: dict, categories: dict) -> bool:
    return categories[segment["category_id"]]["isthing"] == 1


def test_keypoints_lie_on_their_person_or_are_marked_hidden() -> None:
    seen: Counter = Counter()
    for index in range(25):
        rng = image_generator(5, "train", index)
        scene = sample_scene(rng, "train", Settings(classes=2))
        rendering = render(scene, SIZE, rng)
        instances = instance_records(scene, rendering, 1)
        records = keypoint_records(scene, rendering, instances, SIZE)
        assert [r["id"] for r in records] == [r["id"] for r in instances if r["category_id"] == 1]
        for record in records:
            points = np.reshape(record["keypoints"], (17, 3))
            assert record["num_keypoints"] == (points[:, 2] > 0).sum()
            assert (points[points[:, 2] == 0] == 0).all()
            assert set(points[:, 2]) <= {0, 1, 2}
            number = record["id"] % 100
            height, width = rendering.things.shape
            for x, y, v in points[points[:, 2] > 0]:
                assert 0 <= x < width
                assert 0 <= y < height
                assert v == 1 or rendering.things[y, x] == number
            seen.update(points[:, 2].tolist())
    assert seen[2] > seen[0] > 0
    assert seen[1] > 0


def test_left_is_the_persons_own_left() -> None:
    rng = np.random.default_rng(0)
    for pose in (synthetic_coco.scene.sample_pose(rng) for _ in range(40)):
        left_shoulder, right_shoulder = pose.keypoints[5], pose.keypoints[6]
        assert (left_shoulder[0] > right_shoulder[0]) != pose.back
        assert (pose.visibility[:3] == (0 if pose.back else 2)).all()


# Determinism


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    first, again, other = (
        tree_digest(make(tmp_path / name, seed=seed))
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    assert first == again
    images = [name for name in first if name.endswith(".jpg")]
    assert all(first[name] != other[name] for name in images)


def test_an_image_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    few, many = make(tmp_path / "few", train=2), make(tmp_path / "many", train=4)
    common = [name for name in tree_digest(few) if name.endswith((".jpg", ".png"))]
    assert all(tree_digest(few)[name] == tree_digest(many)[name] for name in common)
    few_anns, many_anns = (annotations_of(d, "instances_train")["annotations"] for d in (few, many))
    assert few_anns == many_anns[: len(few_anns)]


def test_the_same_scene_is_drawn_at_every_size() -> None:
    boxes = []
    for size in (64, 256):
        rng = image_generator(0, "val", 0)
        scene = sample_scene(rng, "val", Settings())
        records = instance_records(scene, render(scene, size, rng), 1)
        boxes.append(np.array([record["bbox"] for record in records]) / size)
    assert np.abs(boxes[0] - boxes[1]).max() < 2 / 64


def test_global_generators_are_left_alone(tmp_path: Path) -> None:
    before = np.random.get_state()[1].tolist()
    make(tmp_path / "coco")
    assert np.random.get_state()[1].tolist() == before
