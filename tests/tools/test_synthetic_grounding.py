"""The drawn dataset's grounding files: true phrases, exact spans, MMDetection's three readers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import synthetic_coco.annotations
from synthetic_coco import Scene, Settings, Thing, image_generator, sample_scene
from synthetic_coco.annotations import grounding_records, image_record
from synthetic_coco.dataset import make_dataset
from synthetic_coco.phrases import caption, caption_phrases, expressions
from synthetic_coco.vocabulary import OBJECT_COLORS, TEXTURES, THINGS

SEED, SIZE = 11, 96
COUNTS: dict[str, Any] = {"train": 24, "val": 8}
NAMES = ("odvg.jsonl", "flickr30k.json", "refcoco.json")
PLURALS = {"people": "person", "crosses": "cross"}
LOOK = rf"((?P<color>{'|'.join(OBJECT_COLORS)}) )?((?P<texture>{'|'.join(TEXTURES)}) )?"
RELATION = r"( (?P<side>left of|right of|above|below) (?P<reference>.+))?"
SHAPE = re.compile(
    rf"(?P<count>the|two|three|four) ((?P<size>small|medium|large) )?{LOOK}(?P<noun>\w+){RELATION}"
)
PERSON = re.compile(
    r"(?P<count>the|two|three|four) ((?P<size>small|medium|large) )?(?P<noun>person|people)"
    rf"( in ((an|a) )?{LOOK}shirts?)?{RELATION}"
)


def meant(phrase: str, things: Sequence[Thing]) -> list[int]:
    """Positions of the objects that a phrase's words fit, read anew from the text."""
    match = PERSON.fullmatch(phrase) or SHAPE.fullmatch(phrase)
    assert match, phrase
    noun = match["noun"]
    singular = PLURALS.get(noun, noun if noun == "cross" else noun.removesuffix("s"))
    found = [
        position
        for position, thing in enumerate(things)
        if THINGS[thing.category_id - 1].name == singular
        and match["size"] in (None, thing.size)
        and match["color"] in (None, thing.color)
        and match["texture"] in (None, thing.texture.kind)
    ]
    if match["reference"]:
        (reference,) = meant(match["reference"], things)  # it is one object
        found = [
            position
            for position in found
            if position != reference
            and side_of(things[position], things[reference]) == match["side"]
        ]
    assert (noun == singular) == (len(found) == 1), phrase
    assert match["count"] in ("the", ["", "", "two", "three", "four"][len(found)]), phrase
    return found


def kind_of(phrase: str) -> str:
    """The one thing, besides the class, that a phrase asks for; "" for none or more."""
    match = PERSON.fullmatch(phrase) or SHAPE.fullmatch(phrase)
    assert match
    asked = [name for name in ("size", "color", "texture", "side") if match[name]]
    return asked[0] if len(asked) == 1 else ""


def side_of(first: Thing, second: Thing) -> str:
    (x, y), (other_x, other_y) = first.center, second.center
    if abs(x - other_x) < abs(y - other_y):
        return "above" if y < other_y else "below"
    return "left of" if x < other_x else "right of"


def path_of(root: Path, split: str, name: str) -> Path:
    return root / f"annotations/grounding_{split}2017_{name}"


def content_of(root: Path, split: str, name: str) -> Any:
    text = path_of(root, split, name).read_text()
    return [json.loads(line) for line in text.splitlines()] if "jsonl" in name else json.loads(text)


def instances_of(root: Path, split: str) -> dict[int, list[dict]]:
    """Annotations of the instances file, in the order of the scene's objects, by image."""
    content = json.loads((root / f"annotations/instances_{split}2017.json").read_text())
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in sorted(content["annotations"], key=lambda record: record["id"]):
        by_image[annotation["image_id"]].append(annotation)
    return by_image


def corners(instance: dict) -> list[float]:
    x, y, width, height = instance["bbox"]
    return [x, y, x + width, y + height]


def scenes() -> Iterator[tuple[str, int, Scene]]:
    """Split, image id and scene of every image."""
    for split, count in COUNTS.items():
        for index in range(count):
            scene = sample_scene(image_generator(SEED, split, index), split, Settings())
            yield split, index + 1 + 500_000 * (split == "val"), scene


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grounding") / "coco"
    make_dataset(out, **COUNTS, size=SIZE, seed=SEED, progress=False)
    return out


@pytest.fixture(scope="module")
def language_model(dataset: Path) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from make_tiny_text_model import make_text_model

    out = dataset.parent / "bert"
    make_text_model(out, [path_of(dataset, split, NAMES[0]) for split in COUNTS], 16)
    return out


# What the phrases say


@pytest.mark.parametrize("split", COUNTS)
def test_spans_are_the_phrases_as_mmdetection_reads_the_caption(dataset: Path, split: str) -> None:
    for line in content_of(dataset, split, "odvg.jsonl"):
        text = line["grounding"]["caption"]
        assert text == text.lower().strip()
        assert text.endswith(".")
        assert text.count(".") == 1
        assert len(text.split()) <= 40
        for region in line["grounding"]["regions"]:
            ((begin, end),) = region["tokens_positive"]
            assert text[begin:end] == region["phrase"]
    for entry in content_of(dataset, split, "flickr30k.json")["images"]:
        phrases = [entry["caption"][begin:end] for ((begin, end),) in entry["tokens_positive_eval"]]
        assert f"{', '.join(phrases)}." == entry["caption"]


def test_the_boxes_of_a_phrase_are_exactly_the_instances_that_it_fits(dataset: Path) -> None:
    lines = {
        line["filename"]: line
        for split in COUNTS
        for line in content_of(dataset, split, "odvg.jsonl")
    }
    instances = {split: instances_of(dataset, split) for split in COUNTS}
    assert len(lines) == sum(COUNTS.values())
    for split, image_id, scene in scenes():
        line = lines[f"{image_id:012d}.jpg"]
        boxes = [corners(instance) for instance in instances[split][image_id]]
        said: list[int] = []
        for region in line["grounding"]["regions"]:
            objects = meant(region["phrase"], scene.things)
            assert region["bbox"] == [boxes[position] for position in objects]
            said += objects
        assert sorted(said) == list(range(len(scene.things)))  # each object in one phrase
        assert all(0 <= x0 < x1 <= line["width"] for x0, _, x1, _ in boxes)
        assert all(0 <= y0 < y1 <= line["height"] for _, y0, _, y1 in boxes)


def test_the_three_files_agree_with_each_other_and_with_the_instances(dataset: Path) -> None:
    for split in COUNTS:
        instances = instances_of(dataset, split)
        by_id = {item["id"]: item for items in instances.values() for item in items}
        flickr = content_of(dataset, split, "flickr30k.json")
        odvg = {line["filename"]: line for line in content_of(dataset, split, "odvg.jsonl")}
        for entry in flickr["images"]:
            regions = odvg[entry["file_name"]]["grounding"]["regions"]
            found = [item for item in flickr["annotations"] if item["image_id"] == entry["id"]]
            assert entry["tokens_positive_eval"] == [item["tokens_positive"] for item in regions]
            for number, region in enumerate(regions):
                assert [corners(a) for a in found if a["phrase_ids"] == number] == region["bbox"]
        for annotation in flickr["annotations"]:
            assert annotation.items() >= by_id[annotation["id"]].items()
        for annotation in content_of(dataset, split, "refcoco.json")["annotations"]:
            original = by_id[annotation["original_id"]]
            assert annotation["category_id"] == original["category_id"]
            assert annotation["bbox"] == original["bbox"]


def test_an_expression_describes_one_object_and_is_said_once_of_an_image(dataset: Path) -> None:
    contents = {split: content_of(dataset, split, "refcoco.json") for split in COUNTS}
    images = {image["id"]: image for content in contents.values() for image in content["images"]}
    annotations = [item for content in contents.values() for item in content["annotations"]]
    assert sorted(item["image_id"] for item in annotations) == sorted(images)
    assert len(images) == sum(len(content["images"]) for content in contents.values())
    things = {image_id: scene.things for _, image_id, scene in scenes()}
    said = set()
    for annotation in annotations:
        image = images[annotation["image_id"]]
        assert image["dataset_name"] == "refcoco"
        assert image["caption"].endswith(".")
        (position,) = meant(image["caption"][:-1], things[image["original_id"]])
        assert annotation["original_id"] == 100 * image["original_id"] + position + 1
        said.add((image["original_id"], image["caption"]))
    assert len(said) == len(images)
    described = {item["original_id"] for item in annotations}
    assert len(described) == sum(len(found) for found in things.values())  # every object


def test_phrases_are_true_in_many_scenes_and_of_every_kind() -> None:
    texts, several, told_apart = [], 0, Counter[str]()
    for index in range(300):
        scene = sample_scene(image_generator(1, "train", index), "train", Settings(classes=3))
        positions = range(len(scene.things))
        phrases = caption_phrases(scene, positions, turn=index)
        assert sorted(position for phrase in phrases for position in phrase.objects) == [*positions]
        for phrase in (*phrases, *expressions(scene, positions, turn=index)):
            assert meant(phrase.text, scene.things) == [*phrase.objects]
        several += sum(len(phrase.objects) > 1 for phrase in phrases)
        classes = Counter(thing.category_id for thing in scene.things)
        for phrase in phrases:
            if len(phrase.objects) < classes[scene.things[phrase.objects[0]].category_id]:
                told_apart[kind_of(phrase.text)] += 1
        texts.append(caption(scene, phrases)[0])
    assert max(len(text.split()) for text in texts) <= 40
    assert several > 25
    assert min(told_apart[kind] for kind in ("size", "color", "texture", "side")) > 3
    for word in ("the disks", "two people", "in an orange", "striped", "small", "above", "left of"):
        assert sum(word in text for text in texts) > 3


def test_objects_that_look_alike_are_one_phrase() -> None:
    scene = next(scene for _, _, scene in scenes() if len(scene.things) == 1)
    (thing,) = scene.things
    twins = Scene(scene.aspect, scene.stuff, scene.horizon, (thing, thing))
    (phrase,) = caption_phrases(twins, [0, 1], turn=0)
    assert phrase.objects == (0, 1)
    assert expressions(twins, [0, 1], turn=0) == []
    assert caption_phrases(twins, [0], turn=0) == []  # no phrase means one of them alone


def test_what_is_hardly_visible_is_not_mentioned() -> None:
    _, image_id, scene = next(item for item in scenes() if len(item[2].things) == 1)
    image, instance = image_record(image_id, 96, 96), {"id": 1, "bbox": [1.0, 2.0, 3.75, 20.0]}
    records = grounding_records(scene, image, [instance])
    (line,) = records.pop("odvg")
    assert line["grounding"]["regions"] == []
    assert re.fullmatch(r"\w+( under \w+)?\.", line["grounding"]["caption"])
    assert not any(records.values())  # nothing to measure in this image


def test_same_options_same_bytes(dataset: Path, tmp_path: Path) -> None:
    again = tmp_path / "coco"
    make_dataset(again, **COUNTS, size=SIZE, seed=SEED, progress=False)
    for split in COUNTS:
        for name in NAMES:
            assert path_of(again, split, name).read_bytes() == (
                path_of(dataset, split, name).read_bytes()
            )


def test_the_other_files_do_not_depend_on_the_grounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"train": 3, "val": 2, "size": 64, "progress": False}
    make_dataset(tmp_path / "with", **options)
    monkeypatch.setattr(synthetic_coco.annotations, "grounding_records", lambda *_: {})
    make_dataset(tmp_path / "without", **options)
    for path in (tmp_path / "with").rglob("*.*"):
        if not path.name.startswith("grounding_"):
            other = tmp_path / "without" / path.relative_to(tmp_path / "with")
            assert path.read_bytes() == other.read_bytes()


# MMDetection's readers


def build_dataset(root: Path, split: str, kind: str, name: str, **options: Any) -> Any:
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    config = {
        "type": kind,
        "data_root": str(root),
        "ann_file": f"annotations/grounding_{split}2017_{name}",
        "data_prefix": {"img": f"{split}2017/"},
    }
    return DATASETS.build(config | options)


LOAD = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]


@pytest.mark.parametrize("split", COUNTS)
def test_odvg_dataset_reads_every_line_for_a_training(
    dataset: Path, language_model: Path, split: str
) -> None:
    resize = {"type": "FixScaleResize", "scale": (64, 96), "keep_ratio": True}
    sample_texts = {"type": "RandomSamplingNegPos", "tokenizer_name": str(language_model)}
    meta = ("img_path", "img_shape", "text", "tokens_positive", "dataset_mode")
    pack = {"type": "PackDetInputs", "meta_keys": meta}
    data = build_dataset(
        dataset,
        split,
        "ODVGDataset",
        "odvg.jsonl",
        pipeline=[*LOAD, resize, sample_texts, pack],
        filter_cfg={"filter_empty_gt": False},
        return_classes=True,
    )
    assert len(data) == COUNTS[split]
    lines = content_of(dataset, split, "odvg.jsonl")
    for index in range(0, len(data), 8):
        sample, grounding = data[index]["data_samples"], lines[index]["grounding"]
        regions = grounding["regions"]
        assert sample.text == grounding["caption"]
        assert len(sample.gt_instances) == sum(len(region["bbox"]) for region in regions)
        for label in sample.gt_instances.labels.tolist():
            assert sample.tokens_positive[label] == regions[label]["tokens_positive"]


def prediction(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> dict:
    import torch

    return {
        "bboxes": torch.tensor(boxes),
        "labels": torch.tensor(labels),
        "scores": torch.ones(len(boxes)),
    }


def test_flickr30k_dataset_and_metric_find_true_boxes_right(dataset: Path) -> None:
    data = build_dataset(
        dataset,
        "val",
        "Flickr30kDataset",
        "flickr30k.json",
        pipeline=[],
        filter_cfg={"filter_empty_gt": False},
    )
    import torch
    from mmdet.evaluation import Flickr30kMetric

    assert len(data) == COUNTS["val"]
    true, swapped = Flickr30kMetric(), Flickr30kMetric()
    for index in range(len(data)):
        info = data.get_data_info(index)
        assert info["phrases"] == [info["text"][b:e] for ((b, e),) in info["tokens_positive"]]
        assert sorted(set(info["phrase_ids"])) == list(range(len(info["phrases"])))
        boxes = [instance["bbox"] for instance in info["instances"]]
        sample = {
            "gt_instances": {"bboxes": torch.tensor(boxes)},
            "phrase_ids": info["phrase_ids"],
            "phrases": info["phrases"],
        }
        for metric, labels in (
            (true, info["phrase_ids"]),
            (swapped, [label + 1 for label in info["phrase_ids"]]),
        ):
            sample["pred_instances"] = prediction(boxes, labels)
            metric.process({}, [dict(sample)])
    assert true.compute_metrics(true.results)["1"]["all"] == 1.0
    assert swapped.compute_metrics(swapped.results)["1"]["all"] < 0.5


def test_refcoco_dataset_and_metric_find_true_boxes_right(dataset: Path) -> None:
    data = build_dataset(
        dataset,
        "val",
        "MDETRStyleRefCocoDataset",
        "refcoco.json",
        pipeline=[],
        test_mode=True,
        return_classes=True,
    )
    from mmdet.evaluation import RefExpMetric

    content = content_of(dataset, "val", "refcoco.json")
    assert len(data) == len(content["images"]) > COUNTS["val"]
    metric = RefExpMetric(
        ann_file=str(path_of(dataset, "val", "refcoco.json")), metric="bbox", iou_thrs=0.99
    )
    for index in range(len(data)):
        info = data.get_data_info(index)
        assert info["text"] == content["images"][index]["caption"]
        (instance,) = info["instances"]
        found = prediction([instance["bbox"]], [0])
        metric.process({}, [{"pred_instances": found, "img_id": info["img_id"]}])
    assert metric.compute_metrics(metric.results)["refcoco_precision@1"] == 1.0
