"""Datasets without code, and a train loader that goes on where a training stopped."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.utils.env import seed_all_rng
from torch.utils.data import Sampler

from d2_plugins.data import (
    NamingMapper,
    ResumableTrainLoader,
    _SampleStream,
    derive_seed,
)
from d2_plugins.datasets import register_coco

pytestmark = pytest.mark.usefixtures("registered")

# ------------------------------------------------------------------------------ registered datasets


def test_registered_dataset_gives_its_images(tiny_coco):
    register_coco("data_boxes", *tiny_coco)
    samples = DatasetCatalog.get("data_boxes")
    assert len(samples) == 7
    assert samples[0]["file_name"].startswith(tiny_coco[1])
    metadata = MetadataCatalog.get("data_boxes")
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == ["thing"]
    assert metadata.get("keypoint_names") is None


def with_categories(tiny_coco: tuple[str, str], folder: Path, categories: Any) -> str:
    content = json.loads(Path(tiny_coco[0]).read_text()) | {"categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_keypoints_of_coco_get_cocos_metadata(tiny_coco, tmp_path):
    names = list(COCO_PERSON_KEYPOINT_NAMES)
    categories = [{"id": 1, "name": "person", "keypoints": names}]
    register_coco("data_keypoints", with_categories(tiny_coco, tmp_path, categories), tiny_coco[1])
    metadata = MetadataCatalog.get("data_keypoints")
    assert metadata.keypoint_names == names
    assert set(metadata.keypoint_flip_map) == set(COCO_PERSON_KEYPOINT_FLIP_MAP)


def test_keypoint_without_a_counterpart_is_not_exchanged(tiny_coco, tmp_path):
    names = ["nose", "left_ear", "right_ear", "left_hand"]
    categories = [{"id": 1, "name": "disk"}, {"id": 2, "name": "person", "keypoints": names}]
    register_coco("data_keypoints", with_categories(tiny_coco, tmp_path, categories), tiny_coco[1])
    assert MetadataCatalog.get("data_keypoints").keypoint_flip_map == [("left_ear", "right_ear")]


@pytest.mark.parametrize(
    "pair", [("LeftEye", "RightEye"), ("LEye", "REye"), ("l_eye", "r_eye"), ("eye-l", "eye-r")]
)
def test_sides_of_keypoints_are_known_in_several_spellings(tiny_coco, tmp_path, pair):
    categories = [{"id": 1, "name": "face", "keypoints": [*pair, "nose", "lip"]}]
    register_coco("data_keypoints", with_categories(tiny_coco, tmp_path, categories), tiny_coco[1])
    assert MetadataCatalog.get("data_keypoints").keypoint_flip_map == [pair]


def test_taken_name_is_refused(tiny_coco):
    register_coco("data_taken", *tiny_coco)
    with pytest.raises(ValueError, match="^--register-coco data_taken: a dataset of this name"):
        register_coco("data_taken", *tiny_coco)
    with pytest.raises(ValueError, match="choose another name"):
        register_coco("coco_2017_train", *tiny_coco)


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [1], "annotations": [1 2], "categories": []}',
        '{"images": [1], "annotations": [1]}',
        '{"images": [1], "annotations": [1], "categories": [{"id": 1}]}',
        '{"images": [1], "annotations": [1], "categories": ["person"]}',
    ],
    ids=["broken", "no categories", "category without a name", "name alone"],
)
def test_annotations_that_are_no_coco_json_are_refused(tmp_path, text):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        register_coco("data_broken", str(path), str(tmp_path))
    assert str(error.value).startswith("--register-coco data_broken: ") and repr(str(path)) in str(
        error.value
    )
    assert "data_broken" not in DatasetCatalog


def test_missing_annotations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^--register-coco data_none: there is no annotation file"):
        register_coco("data_none", str(tmp_path / "none.json"), str(tmp_path))
    assert "data_none" not in DatasetCatalog


# -------------------------------------------------------------------------------- stream of samples


class EndlessSampler(Sampler):
    """Shuffles anew for each epoch; the same each time that it is iterated over."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(self.seed)
        while True:
            yield from generator.sample(range(self.size), self.size)


def batches_of(stream: Any, groups: tuple[bool, ...], batch_size: int) -> Iterator[list[Any]]:
    """Batches that Detectron2 makes of a stream of (place, index)."""

    def samples() -> Iterator[dict[str, Any]]:
        for place, index in stream:
            width = 2 if groups[index] else 1
            yield {"width": width, "height": 1, "sample": (place, index)}

    for batch in AspectRatioGroupedDataset(samples(), batch_size):
        yield [sample["sample"] for sample in batch]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_stream_goes_on_with_the_batches_of_one_that_was_not_interrupted(batch_size):
    for size in (1, 2, 3, 5):
        for seed, groups in enumerate(itertools.product([False, True], repeat=size)):
            sampler = EndlessSampler(size, seed)
            whole = batches_of(enumerate(iter(sampler)), groups, batch_size)
            expected = list(itertools.islice(whole, 12))
            for start in (0, 1, 2, 5, 9):
                stream = _SampleStream(sampler, list(groups), batch_size)
                stream.batches_done = start
                resumed = batches_of(stream, groups, batch_size)
                batches = list(itertools.islice(resumed, 12 - start))
                assert batches == expected[start:], (groups, start)


def test_stream_can_be_iterated_over_again():
    stream = _SampleStream(EndlessSampler(5, 0), [False, True, True, False, True], 2)
    stream.batches_done = 3
    first, second = (list(itertools.islice(stream, 10)) for _ in range(2))
    assert first == second


def test_derived_seeds_depend_on_every_number_and_their_order():
    numbers = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 10**7), (2**31 - 1, 7, 10**7)]
    seeds = [derive_seed(*n) for n in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [derive_seed(*n) for n in numbers]


# --------------------------------------------------------------------------------------- the loader


@pytest.fixture
def loader_cfg(cfg: CfgNode, tiny_coco: tuple[str, str]) -> CfgNode:
    register_coco("data_loader", *tiny_coco)
    cfg.DATASETS.TRAIN = ("data_loader",)
    cfg.SEED = 7
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (16, 24)
    cfg.INPUT.MAX_SIZE_TRAIN = 48
    cfg.INPUT.CROP.ENABLED = True
    return cfg


def take(cfg: CfgNode, count: int, start: int = 0) -> list[tuple[list[dict[str, Any]], float]]:
    """Batches ``start``, … of a new training, each with the random number that follows it."""
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else 1)  # as Detectron2's default_setup does
    loader = ResumableTrainLoader(cfg)
    loader.start_iter = start  # known only later, as in a trainer
    seed_all_rng(start)  # what else draws random numbers: the model, the checkpoint
    return [(batch, torch.rand(()).item()) for batch in itertools.islice(iter(loader), count)]


def assert_equal(batches: list[Any], expected: list[Any]) -> None:
    assert len(batches) == len(expected)
    for (batch, number), (other, other_number) in zip(batches, expected, strict=True):
        assert [s["image_id"] for s in batch] == [s["image_id"] for s in other]
        for sample, twin in zip(batch, other, strict=True):
            assert torch.equal(sample["image"], twin["image"])
            boxes, twin_boxes = sample["instances"].gt_boxes, twin["instances"].gt_boxes
            assert torch.equal(boxes.tensor, twin_boxes.tensor)
        assert number == other_number


GROUPING = pytest.mark.parametrize("grouping", [True, False], ids=["grouped", "ungrouped"])


@GROUPING
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_loader_goes_on_with_equal_batches(loader_cfg, workers, grouping):
    loader_cfg.DATALOADER.NUM_WORKERS = workers
    loader_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    expected = take(loader_cfg, 8)
    for start in (0, 3) if workers else (0, 1, 4, 6):
        assert_equal(take(loader_cfg, 8 - start, start), expected[start:])


@GROUPING
def test_batches_do_not_depend_on_the_number_of_workers(loader_cfg, grouping):
    loader_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    expected = take(loader_cfg, 6)
    loader_cfg.DATALOADER.NUM_WORKERS = 2
    assert_equal(take(loader_cfg, 6), expected)


def test_batches_do_not_depend_on_random_numbers_drawn_before(loader_cfg):
    loaders = []
    for seed in (1, 2):
        seed_all_rng(seed)
        loaders.append(ResumableTrainLoader(loader_cfg))
    first, second = (
        [[s["image_id"] for s in batch] for batch in itertools.islice(iter(loader), 6)]
        for loader in loaders
    )
    assert first == second


def test_random_numbers_drawn_after_do_not_depend_on_the_loader(loader_cfg):
    seed_all_rng(1)
    expected = np.random.rand(), torch.rand(()).item()
    seed_all_rng(1)
    ResumableTrainLoader(loader_cfg)
    assert (np.random.rand(), torch.rand(()).item()) == expected


def test_one_image_is_augmented_differently_each_time(loader_cfg):
    images = [s["image"] for batch, _ in take(loader_cfg, 16) for s in batch if s["image_id"] == 1]
    assert len(images) > 2
    assert len({tuple(image.flatten().tolist()) for image in images}) > 2


def test_another_seed_gives_other_batches(loader_cfg):
    first = [s["image_id"] for batch, _ in take(loader_cfg, 6) for s in batch]
    loader_cfg.SEED = 8
    assert [s["image_id"] for batch, _ in take(loader_cfg, 6) for s in batch] != first


def test_batches_hold_one_aspect_ratio_group_where_asked(loader_cfg):
    def shapes(batch: list[dict[str, Any]]) -> set[bool]:
        return {sample["width"] > sample["height"] for sample in batch}

    assert all(len(shapes(batch)) == 1 for batch, _ in take(loader_cfg, 10))
    loader_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert any(len(shapes(batch)) == 2 for batch, _ in take(loader_cfg, 10))


def test_samples_that_are_left_out_are_not_loaded(loader_cfg, monkeypatch):
    loaded = []
    load = NamingMapper.__call__
    monkeypatch.setattr(
        NamingMapper,
        "__call__",
        lambda self, sample: loaded.append(sample["image_id"]) or load(self, sample),
    )
    loader_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    take(loader_cfg, 1, start=100)
    assert len(loaded) == 3


def test_without_a_seed_the_loader_is_detectron2s(loader_cfg):
    loader_cfg.SEED = -1
    loader = ResumableTrainLoader(loader_cfg)
    assert type(loader._loader) is AspectRatioGroupedDataset
    loader.start_iter = 3
    numbers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        batch = next(iter(loader))
        assert len(batch) == 3 and {"image", "instances"} <= batch[0].keys()
        numbers.append(torch.rand(()).item())
    assert numbers[0] != numbers[1]  # nothing has seeded PyTorch


# ------------------------------------------------------------------------------------ broken images


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("content", ["truncated", "empty", "text", "missing"])
def test_broken_image_is_named(cfg, tiny_coco, tmp_path, content, is_train):
    whole = (Path(tiny_coco[1]) / "1.png").read_bytes()
    path = tmp_path / "broken.png"
    if content != "missing":
        path.write_bytes({"truncated": whole[:-40], "empty": b"", "text": b"<html>"}[content])
    mapper = NamingMapper(DatasetMapper(cfg, is_train))
    sample = {"file_name": str(path), "width": 24, "height": 16, "annotations": []}
    with pytest.raises(ValueError) as error:
        mapper(sample)
    assert str(error.value).startswith(f"image {str(path)!r} cannot be read (")


def test_loader_stops_at_a_broken_image_and_names_it(loader_cfg, tiny_coco, tmp_path):
    content = json.loads(Path(tiny_coco[0]).read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = content["annotations"][:1]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    (tmp_path / "1.png").write_bytes(b"no image")
    register_coco("data_broken_image", str(tmp_path / "annotations.json"), str(tmp_path))
    loader_cfg.DATASETS.TRAIN = ("data_broken_image",)
    with pytest.raises(ValueError, match="image '.*/1.png' cannot be read"):
        next(iter(ResumableTrainLoader(loader_cfg)))
