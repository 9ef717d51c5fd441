"""Writing a whole dataset, or nothing.

Everything is drawn into a temporary sibling of the output directory. When it is complete, it takes
the output's name. A directory is replaced only if this tool wrote everything in it.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from whole_folder import ArgumentError, check_target, whole_folder

from . import annotations
from .captions import captions
from .draw import render
from .scene import SPLITS, Settings, image_generator, sample_scene
from .vocabulary import THINGS, companions

MIN_SIZE, MAX_SIZE = 64, 2048
# First val id, whatever the number of train images. So a val image keeps its name.
VAL_ID_OFFSET = 500_000
MARKER = "annotations/synthetic_coco.json"
_OWN_FILES = re.compile(
    r"(train|val)2017/\d{12}\.jpg"
    r"|annotations/panoptic_(train|val)2017/\d{12}\.png"
    r"|annotations/(instances|person_keypoints|panoptic|captions)_(train|val)2017\.json"
    r"|annotations/grounding_(train|val)2017_(odvg\.jsonl|flickr30k\.json|refcoco\.json)"
    r"|annotations/(synthetic_coco|context_bias)\.json"
    rf"|classification/(train|val)/({'|'.join(thing.name for thing in THINGS)})/\d{{12}}\.jpg"
)


@dataclass(frozen=True)
class Summary:
    """The numbers of images and objects that were written, and their place."""

    train: int
    val: int
    objects: int
    out: Path


def make_dataset(
    out: str | Path,
    train: int,
    val: int,
    size: int = 256,
    seed: int = 0,
    *,
    classes: int = len(THINGS),
    context_bias: float | None = None,
    imbalance: float = 1.0,
    class_colors: bool = False,
    ambiguous: float = 0.0,
    classification: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Draw a dataset in the layout of COCO 2017.

    Args:
        out: directory to write; must not exist unless ``force``.
        train: number of train images, 0…500000.
        val: number of val images, 0…500000.
        size: long side of the images in pixels, 64…2048; the short side is 0.75…1 of it.
        seed: ≥ 0; the same seed gives the same bytes.
        classes: number of object classes, 2…7: person, disk, square, triangle, star, ring, cross.
        context_bias: P in 0.5…1: of the images that hold a class, a share P also holds the class's
            companion in train, and a share 1 - P in val. None: no correlation.
        imbalance: ≥ 1; object counts of the classes fall geometrically to 1/R in train. Val
            stays balanced, so that the rare classes' AP can be measured.
        class_colors: give each class a colour of its own. Otherwise any object may have any colour.
        ambiguous: P in 0…1: in a share P of the images one object is drawn as a pebble, which tells
            no class. Its annotation keeps the class.
        classification: one object in each image, and the images also as folders of classes. With
            ``imbalance`` these have a long tail in train.
        force: replace a dataset that this tool wrote, once the new one is complete.
        progress: show a progress bar on stderr.

    Returns:
        The numbers of images and objects written, and their place.

    Raises:
        ArgumentError: an argument is out of range, or ``out`` may not be written.
    """
    settings = Settings(classes, context_bias, imbalance, class_colors, ambiguous, classification)
    _check_arguments(train, val, size, seed, settings)
    target = Path(os.path.abspath(out))
    check = partial(check_target, target, force, _OWN_FILES, MARKER)
    check()
    counts = {"train": train, "val": val}
    with whole_folder(target, check) as root:
        with tqdm(total=train + val, unit="image", disable=not progress) as bar:
            objects = sum(
                _write_split(root, split, counts[split], size, seed, settings, bar)
                for split in SPLITS
            )
        options = {"size": size, "seed": seed, **counts, **asdict(settings)}
        for name in ("ambiguous", "classification"):
            if not options[name]:
                del options[name]  # so that the file stays what it was without the option
        _write_json(root / MARKER, {"description": annotations.DESCRIPTION, "options": options})
        if context_bias is not None:
            _write_json(root / "annotations/context_bias.json", _bias(classes, context_bias))
    return Summary(train, val, objects, Path(out))


def _check_arguments(train: int, val: int, size: int, seed: int, settings: Settings) -> None:
    for name, count in (("--train", train), ("--val", val)):
        if not 0 <= count <= VAL_ID_OFFSET:
            raise ArgumentError(f"{name}: {count} images; give a number from 0 to {VAL_ID_OFFSET}")
    if train + val == 0:
        raise ArgumentError("--train and --val: both are 0; give at least one image")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ArgumentError(f"--size: {size} pixels; give a long side of {MIN_SIZE} to {MAX_SIZE}")
    if seed < 0:
        raise ArgumentError(f"--seed: {seed}; give a number of at least 0")
    if not 2 <= settings.classes <= len(THINGS):
        raise ArgumentError(
            f"--classes: {settings.classes}; give a number from 2 to {len(THINGS)}, person included"
        )
    bias, ratio = settings.context_bias, settings.imbalance
    if bias is not None and not 0.5 <= bias <= 1:
        raise ArgumentError(f"--context-bias: {bias}; give a probability from 0.5 to 1")
    if not 1 <= ratio < float("inf"):
        raise ArgumentError(f"--imbalance: {ratio}; give a ratio of at least 1")
    if bias is not None and ratio != 1:
        raise ArgumentError(
            f"--imbalance: {ratio} together with --context-bias {bias}; give only one of them, "
            "since companions that are always seen together cannot differ in frequency"
        )
    if bias is not None and settings.classification:
        raise ArgumentError(
            f"--classification: together with --context-bias {bias}; give only one of them, since "
            "an image of one object holds no companion"
        )
    if not 0 <= settings.ambiguous <= 1:
        raise ArgumentError(f"--ambiguous: {settings.ambiguous}; give a share from 0 to 1")


def _write_split(
    root: Path, split: str, count: int, size: int, seed: int, settings: Settings, bar: Any
) -> int:
    """Write the images and annotation files of a split; returns the number of objects."""
    images, panoptic_pngs = root / f"{split}2017", root / f"annotations/panoptic_{split}2017"
    images.mkdir()
    folders = {
        thing.id: root / "classification" / split / thing.name
        for thing in THINGS[: settings.classes]
        if settings.classification
    }
    for folder in folders.values():  # of a class without an image, too: folders number the classes
        folder.mkdir(parents=True)
    panoptic_pngs.mkdir(parents=True)
    records: defaultdict[str, annotations.Records] = defaultdict(list)
    for index in range(count):
        image_id = index + 1 + (VAL_ID_OFFSET if split == "val" else 0)
        rng = image_generator(seed, split, index)
        scene = sample_scene(rng, split, settings)
        rendering = render(scene, size, rng)
        # Quality and subsampling are fixed here: Pillow's defaults may change.
        Image.fromarray(rendering.image).save(
            images / f"{image_id:012d}.jpg", quality=92, subsampling="4:4:4"
        )
        segments, png = annotations.panoptic_record(scene, rendering, image_id)
        Image.fromarray(png).save(panoptic_pngs / segments["file_name"], compress_level=6)
        instances = annotations.instance_records(scene, rendering, image_id)
        image = annotations.image_record(image_id, *scene.pixels(size))
        records["images"].append(image)
        records["instances"] += instances
        records["person_keypoints"] += annotations.keypoint_records(
            scene, rendering, instances, size
        )
        records["panoptic"].append(segments)
        records["captions"] += annotations.caption_records(captions(scene), image_id)
        for name, found in annotations.grounding_records(scene, image, instances).items():
            records[name] += found
        for thing in scene.things if settings.classification else ():
            shutil.copy(images / image["file_name"], folders[thing.category_id])
        bar.update()
    _write_annotations(root / "annotations", split, records, settings.classes)
    _write_grounding(root / "annotations", split, records, settings.classes)
    return len(records["instances"])


def _write_annotations(
    folder: Path, split: str, records: defaultdict[str, annotations.Records], classes: int
) -> None:
    categories = {
        "instances": {"categories": annotations.thing_categories(classes)},
        "person_keypoints": {"categories": annotations.person_categories()},
        "panoptic": {"categories": annotations.panoptic_categories(classes)},
        "captions": {},  # COCO's captions have no categories
    }
    for name, section in categories.items():
        content = {"images": records["images"], "annotations": records[name], **section}
        _write_json(folder / f"{name}_{split}2017.json", annotations.file_head() | content)


def _write_grounding(
    folder: Path, split: str, records: defaultdict[str, annotations.Records], classes: int
) -> None:
    start = f"grounding_{split}2017"
    lines = "".join(f"{_json(record)}\n" for record in records["odvg"])
    (folder / f"{start}_odvg.jsonl").write_text(lines, encoding="utf-8")
    for name in ("flickr30k", "refcoco"):
        content = {
            "images": records[f"{name}_images"],
            "annotations": records[name],
            "categories": annotations.thing_categories(classes),
        }
        _write_json(folder / f"{start}_{name}.json", annotations.file_head() | content)


def _bias(classes: int, probability: float) -> annotations.Record:
    pairs = companions(classes).items()
    return {
        "companions": [
            {"category_id": category_id, "companion_id": other} for category_id, other in pairs
        ],
        "probability": {"train": probability, "val": 1 - probability},
    }


def _write_json(path: Path, content: annotations.Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(content), encoding="utf-8")


def _json(content: annotations.Record) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
