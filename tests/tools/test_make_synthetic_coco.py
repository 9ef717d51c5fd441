"""The drawn dataset: COCO's layout, true annotations, the knobs' statistics, safe writing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import make_synthetic_coco
import numpy as np
import pytest
import synthetic_coco.dataset
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from synthetic_coco import (
    THINGS,
    ArgumentError,
    Settings,
    companions,
    image_generator,
    make_dataset,
    render,
    sample_scene,
)
from synthetic_coco.annotations import instance_records, keypoint_records
from synthetic_coco.scene import MIN_VISIBLE, class_frequencies, sample_categories
from synthetic_coco.shapes import bounds
from synthetic_coco.vocabulary import OBJECT_COLORS, STUFF_COLORS

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZE = 96
COUNTS = {"train": 24, "val": 12}


def tree_digest(root: Path) -> dict[str, str]:
    """SHA-256 of every file under ``root``, by relative path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def make(out: Path, **options: object) -> Path:
    """A small dataset, quietly."""
    make_dataset(out, **{"train": 2, "val": 1, "size": 64, "progress": False, **options})
    return out


def annotations_of(root: Path, name: str) -> dict:
    return json.loads((root / f"annotations/{name}2017.json").read_text())


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


# The knobs


def companion_rates(split: str, settings: Settings, count: int) -> list[float]:
    """Share of the images with a class that also hold its companion, by class."""
    having, both = Counter(), Counter()
    pairs = companions(settings.classes)
    for index in range(count):
        present = set(sample_categories(image_generator(0, split, index), split, settings))
        having.update(present)
        both.update(c for c in present if pairs[c] in present)
    return [both[category] / having[category] for category in pairs]


@pytest.mark.parametrize("classes", [2, 3, 6, 7])
def test_companions_appear_with_p_in_train_and_with_1_minus_p_in_val(classes: int) -> None:
    settings = Settings(classes=classes, context_bias=0.9)
    assert companion_rates("train", settings, 1200) == pytest.approx([0.9] * classes, abs=0.04)
    assert companion_rates("val", settings, 1200) == pytest.approx([0.1] * classes, abs=0.05)


@pytest.mark.parametrize("settings", [Settings(), Settings(context_bias=1.0)])
def test_scenes_hold_all_the_categories_that_were_sampled(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    wanted: list[int] = []

    def remember(*arguments: object) -> list[int]:
        wanted[:] = sample_categories(*arguments)
        return list(wanted)

    monkeypatch.setattr(synthetic_coco.scene, "sample_categories", remember)
    for index in range(100):
        scene = sample_scene(image_generator(0, "train", index), "train", settings)
        assert [thing.category_id for thing in scene.things] == wanted


@pytest.mark.parametrize("classes", range(2, 8))
def test_companions_are_a_derangement(classes: int) -> None:
    pairs = companions(classes)
    assert sorted(pairs) == sorted(pairs.values()) == list(range(1, classes + 1))
    assert all(category != other for category, other in pairs.items())


def test_context_bias_file_holds_the_pairs(tmp_path: Path, dataset: Path) -> None:
    content = json.loads(
        (make(tmp_path / "coco", context_bias=0.75) / "annotations/context_bias.json").read_text()
    )
    pairs = {p["category_id"]: p["companion_id"] for p in content["companions"]}
    assert pairs == companions(7)
    assert content["probability"] == {"train": 0.75, "val": 0.25}
    assert not (dataset / "annotations/context_bias.json").exists()


def class_counts(split: str, settings: Settings) -> list[int]:
    counts = Counter(
        category
        for index in range(2000)
        for category in sample_categories(image_generator(0, split, index), split, settings)
    )
    return [counts[category] for category in range(1, settings.classes + 1)]


def test_imbalance_falls_geometrically_in_train_and_val_is_balanced() -> None:
    settings = Settings(imbalance=8.0)
    ratios = class_frequencies(7, 8.0)[1:] / class_frequencies(7, 8.0)[:-1]
    assert ratios == pytest.approx(np.full(6, 8 ** (-1 / 6)))
    train = class_counts("train", settings)
    assert np.array(train) / train[0] == pytest.approx(8 ** (-np.arange(7) / 6), rel=0.15)
    val = class_counts("val", settings)
    assert np.array(val) / np.mean(val) == pytest.approx(np.ones(7), abs=0.1)


def test_classification_has_an_object_in_each_image_and_folders_of_classes(tmp_path: Path) -> None:
    root = make(tmp_path / "a", train=12, val=4, classes=3, classification=True, imbalance=50)
    for split, count in (("train", 12), ("val", 4)):
        content = annotations_of(root, f"instances_{split}")
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert len(content["images"]) == len(content["annotations"]) == count
        expected = {
            f"{names[a['category_id']]}/{a['image_id']:012d}.jpg" for a in content["annotations"]
        }
        folder = root / "classification" / split
        assert {path.name for path in folder.iterdir()} == {"person", "disk", "square"}
        found = {path.relative_to(folder).as_posix(): path for path in folder.glob("*/*")}
        assert set(found) == expected
        for path in found.values():
            assert path.read_bytes() == (root / f"{split}2017" / path.name).read_bytes()
    make(root, classification=True, force=True)  # all of it is the tool's own


def test_classes_limits_the_categories(tmp_path: Path) -> None:
    content = annotations_of(make(tmp_path / "coco", train=12, classes=3), "instances_train")
    assert [c["name"] for c in content["categories"]] == ["person", "disk", "square"]
    assert {ann["category_id"] for ann in content["annotations"]} <= {1, 2, 3}


def test_class_colors_change_the_colors_alone_and_each_stands_out_from_every_ground() -> None:
    seen = defaultdict(set)
    for index in range(40):
        free, fixed = (
            sample_scene(image_generator(3, "train", index), "train", Settings(class_colors=on))
            for on in (False, True)
        )
        assert (free.stuff, free.horizon) == (fixed.stuff, fixed.horizon)
        assert [t.center for t in free.things] == [t.center for t in fixed.things]
        for thing in fixed.things:
            seen[thing.category_id].add(thing.color)
    assert sorted(seen) == [category.id for category in THINGS]
    colors = [color for (color,) in seen.values()]
    assert len(set(colors)) == len(THINGS)
    for color in colors:
        for ground in STUFF_COLORS.values():
            assert np.linalg.norm(np.subtract(OBJECT_COLORS[color], ground)) > 95


@pytest.mark.parametrize("class_colors", [False, True])
def test_ambiguous_object_of_an_image_looks_alike_whatever_its_class(class_colors: bool) -> None:
    settings = Settings(4, ambiguous=0.5, class_colors=class_colors)
    looks, counts = defaultdict(list), []
    for index in range(400):
        counts.append(0)
        for thing in sample_scene(image_generator(3, "train", index), "train", settings).things:
            x0, y0, x1, y1 = bounds(thing.outline)
            is_pebble = [len(part.contours[0]) for part in thing.outline] == [64]
            is_pebble &= min(x1 - x0, y1 - y0) < 0.999 * max(x1 - x0, y1 - y0)  # no disk
            counts[-1] += is_pebble
            if is_pebble:
                assert thing.pose is None and thing.color == "purple" or not class_colors
                looks[thing.category_id].append((x1 - x0) * (y1 - y0))
    assert sorted(looks) == [1, 2, 3, 4]
    assert set(counts) == {0, 1} and 0.45 < np.mean(counts) < 0.55
    areas = [np.mean(values) for values in looks.values()]
    assert max(areas) < 1.3 * min(areas)  # a figure's would be twice as large


def test_ambiguous_objects_keep_their_class_and_a_person_among_them_has_no_keypoints(
    tmp_path: Path,
) -> None:
    root = make(tmp_path / "coco", train=9, classes=2, ambiguous=1.0, context_bias=0.9)
    persons = annotations_of(root, "person_keypoints_train")["annotations"]
    unseen = [person for person in persons if person["keypoints"] == [0] * 51]
    assert 0 < len(unseen) < len(persons)
    assert [p for p in persons if p["num_keypoints"] == 0] == unseen
    instances = annotations_of(root, "instances_train")["annotations"]
    assert {ann["category_id"] for ann in instances} == {1, 2}
    options = json.loads((root / "annotations/synthetic_coco.json").read_text())["options"]
    assert options["ambiguous"] == 1.0
    assert tree_digest(root) == tree_digest(
        make(tmp_path / "again", train=9, classes=2, ambiguous=1.0, context_bias=0.9)
    )


def test_scenes_without_the_option_are_what_they_were_before_it(tmp_path: Path) -> None:
    scene = sample_scene(image_generator(0, "train", 0), "train", Settings(4, 0.9))
    assert [t.category_id for t in scene.things] == [3, 4, 1, 2]
    np.testing.assert_allclose(
        [t.center for t in scene.things],
        [
            [0.8221735, 0.5624352],
            [0.7897662, 0.3772331],
            [0.2719718, 0.4829042],
            [0.5908939, 0.7840301],
        ],
        atol=1e-6,
    )
    options = json.loads((make(tmp_path / "a") / "annotations/synthetic_coco.json").read_text())
    assert "ambiguous" not in options["options"]


# Safe writing


def run_main(*arguments: object) -> int:
    return make_synthetic_coco.main([str(argument) for argument in arguments])


def test_an_existing_dataset_is_kept_without_force_and_replaced_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = make(tmp_path / "coco", seed=1)
    before = tree_digest(out)
    command = (out, "--train", 2, "--val", 1, "--size", 64, "--seed", 2)
    assert run_main(*command) == 2
    assert "already exists" in capsys.readouterr().err
    assert tree_digest(out) == before
    assert run_main(*command, "--force") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "2 train and 1 val images" in printed
    assert str(out) in printed
    assert tree_digest(out) == tree_digest(make(tmp_path / "expected", seed=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "expected"]


@pytest.mark.parametrize("name", ["notes.txt", "train2017/photo.jpg", "annotations/stuff.json"])
def test_force_refuses_a_directory_with_foreign_files(tmp_path: Path, name: str) -> None:
    out = make(tmp_path / "coco")
    (out / name).write_text("mine")
    before = tree_digest(out)
    with pytest.raises(ArgumentError, match=name):
        make(out, force=True)
    assert tree_digest(out) == before


def test_force_refuses_a_dataset_of_the_same_layout_that_it_did_not_write(tmp_path: Path) -> None:
    out = make(tmp_path / "coco")
    (out / "annotations/synthetic_coco.json").unlink()
    with pytest.raises(ArgumentError, match="lacks"):
        make(out, force=True)
    assert (out / "annotations/instances_train2017.json").exists()


def test_force_refuses_links_files_and_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "coco")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(ArgumentError, match="not a directory"):
            make(tmp_path / name, force=True)
    for place in (out, out / "annotations"):
        monkeypatch.chdir(place)
        with pytest.raises(ArgumentError, match="current directory"):
            make(out, force=True)
    assert (out / "annotations/instances_train2017.json").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_run_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], exists: bool
) -> None:
    out = tmp_path / "coco"
    if exists:
        make(out)
    before = tree_digest(tmp_path)

    def fail(*arguments: object) -> None:
        raise error("third image")

    monkeypatch.setattr(synthetic_coco.dataset, "render", fail)
    with pytest.raises(error):
        make(out, force=exists, seed=3)
    assert tree_digest(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if exists else [])


def test_what_appears_during_the_run_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "coco"

    def draw(*arguments: object) -> object:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")
        return render(*arguments)

    monkeypatch.setattr(synthetic_coco.dataset, "render", draw)
    with pytest.raises(ArgumentError, match="already exists"):
        make(out)
    assert tree_digest(tmp_path).keys() == {"coco/mine.txt"}


def test_a_terminated_run_cleans_up(tmp_path: Path) -> None:
    script = str(TOOLS / "make_synthetic_coco.py")
    command = [sys.executable, script, "coco", "--train", "100000", "--val", "0", "--size", "64"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 15
        while not list(tmp_path.glob(".coco.partial-*/train2017/*.jpg")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 130
    assert "interrupted; nothing was written" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", -1), "--train: -1 images; give a number from 0"),
        (("--val", -2), "--val: -2 images; give a number from 0"),
        (("--train", 0, "--val", 0), "both are 0"),
        (("--size", 63), "--size: 63 pixels; give a long side of 64"),
        (("--seed", -1), "--seed: -1; give a number of at least 0"),
        (("--classes", 1), "--classes: 1; give a number from 2 to 7"),
        (("--classes", 8), "--classes: 8; give a number from 2 to 7"),
        (("--context-bias", 0.4), "--context-bias: 0.4; give a probability from 0.5 to 1"),
        (("--context-bias", "nan"), "--context-bias: nan; give a probability"),
        (("--imbalance", 0.5), "--imbalance: 0.5; give a ratio of at least 1"),
        (("--imbalance", 4, "--context-bias", 0.9), "give only one of them"),
        (("--classification", "--context-bias", 0.9), "give only one of them"),
        (("--ambiguous", 1.5), "--ambiguous: 1.5; give a share from 0 to 1"),
        (("--ambiguous", "nan"), "--ambiguous: nan; give a share from 0 to 1"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: tuple, message: str
) -> None:
    assert run_main(tmp_path / "coco", "--train", 1, "--val", 1, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    assert run_main(tmp_path / "file/coco", "--train", 1, "--val", 1) == 2
    assert "cannot write in" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentError, match="cannot write in"):
        make(tmp_path / "coco")


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic_coco.dataset, "render", fail)
    assert run_main(tmp_path / "coco", "--train", 1, "--val", 1) == 1
    assert "No space left on device; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
