"""The drawn dataset's knobs: companions, imbalance, classes, colours, objects that look alike."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import synthetic_coco.scene
from synthetic_coco import THINGS, Settings, companions, image_generator, sample_scene
from synthetic_coco.scene import class_frequencies, sample_categories
from synthetic_coco.shapes import bounds
from synthetic_coco.vocabulary import OBJECT_COLORS, STUFF_COLORS
from synthetic_coco_cases import annotations_of, make, tree_digest


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


@pytest.mark.parametrize(("split", "share"), [("train", 0.9), ("val", 0.1)])
@pytest.mark.parametrize("classes", [4, 7])
def test_of_the_pebbles_of_a_class_a_share_is_beside_the_companion(classes, split, share) -> None:
    settings = Settings(classes, context_bias=0.9, ambiguous=1.0)
    in_company = defaultdict(list)
    for index in range(300 * classes):
        categories = sample_categories(image_generator(0, split, index), split, settings, True)
        assert len(set(categories)) == 2
        in_company[categories[0]].append(categories[1] == companions(classes)[categories[0]])
    assert len(in_company) == classes
    for found in in_company.values():
        assert abs(np.mean(found) - share) < 0.07


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
