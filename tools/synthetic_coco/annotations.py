"""A scene's records: COCO's instances, keypoints, panoptic segments; MMDetection's grounding.

Segmentation, box and area describe the visible part of an object, as in COCO. Polygons are in
continuous pixel coordinates (0…W, 0…H). The box (x, y, w, h) is their extent, the area is theirs.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .draw import SUPERSAMPLE, Rendering
from .phrases import caption, caption_phrases, expressions
from .scene import Scene, Thing
from .vocabulary import KEYPOINTS, PERSON_ID, SKELETON, STUFF, THINGS, Category

Record = dict[str, Any]
Records = list[Record]

DESCRIPTION = "Synthetic scenes in the layout of COCO 2017"
# Fixed: a date of today would change the bytes of the files.
_DATE = "2017-01-01 00:00:00"
_LICENSE = {"id": 1, "name": "No known copyright restrictions", "url": ""}
# An annotation's id is image id * _IDS_PER_IMAGE + position. It depends on no other image.
_IDS_PER_IMAGE = 100
_MIN_PIECE = 1.0  # square pixels; smaller splinters of an occluded object are not outlined
_MIN_MENTIONED = 4.0  # pixels; least width and height of the visible box of a mentioned object


def file_head() -> Record:
    """Make ``info`` and ``licenses`` of an annotation file."""
    info = {
        "contributor": "make_synthetic_coco.py",
        "date_created": _DATE[:10].replace("-", "/"),
        "description": DESCRIPTION,
        "url": "",
        "version": "1.0",
        "year": 2017,
    }
    return {"info": info, "licenses": [_LICENSE]}


def thing_categories(classes: int) -> list[Record]:
    """List the categories of the instances file."""
    return [_category(category) for category in THINGS[:classes]]


def person_categories() -> list[Record]:
    """List the one category of the keypoints file, with COCO's keypoint names and skeleton."""
    skeleton = [list(pair) for pair in SKELETON]
    return [_category(THINGS[0]) | {"keypoints": list(KEYPOINTS), "skeleton": skeleton}]


def panoptic_categories(classes: int) -> list[Record]:
    """List the categories of the panoptic file: things, then stuff."""
    marked = [(category, 1) for category in THINGS[:classes]] + [(item, 0) for item in STUFF]
    return [
        _category(category) | {"isthing": isthing, "color": list(category.color)}
        for category, isthing in marked
    ]


def _category(category: Category) -> Record:
    return {
        "id": category.id,
        "name": category.name,
        "supercategory": category.supercategory,
    }


def image_record(image_id: int, width: int, height: int) -> Record:
    """Make an entry of ``images``."""
    return {
        "id": image_id,
        "file_name": f"{image_id:012d}.jpg",
        "width": width,
        "height": height,
        "license": _LICENSE["id"],
        "date_captured": _DATE,
        "coco_url": "",
        "flickr_url": "",
    }


def instance_records(scene: Scene, rendering: Rendering, image_id: int) -> list[Record]:
    """Make one instance annotation for each object of the scene, from back to front."""
    records = []
    for number, thing in enumerate(scene.things, start=1):
        polygons = visible_polygons(rendering.things_fine == number)
        points = np.concatenate(polygons)
        low, high = points.min(axis=0), points.max(axis=0)
        records.append(
            {
                "id": image_id * _IDS_PER_IMAGE + number,
                "image_id": image_id,
                "category_id": thing.category_id,
                "segmentation": [polygon.ravel().tolist() for polygon in polygons],
                "area": float(sum(_polygon_area(polygon) for polygon in polygons)),
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "iscrowd": 0,
            }
        )
    return records


def visible_polygons(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Trace the outlines of a supersampled mask, each (n ≥ 3, 2) in image pixels, largest first.

    COCO's polygons have no holes: a mask with one is cut in two along a column through it.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    corner = np.array([columns[0], rows[0]])
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    # Contours run through the centres of the marked cells; marking the four corners of
    # each pixel makes them run along the pixels' edges, so that no half pixel is lost.
    corners = np.pad(window, ((0, 1), (0, 1)))
    cv2.dilate(corners.copy(), np.ones((2, 2), np.uint8), dst=corners)
    # Quarters of a pixel are exact in binary: x + w never exceeds the image by a rounding error.
    polygons = [(contour + corner) / SUPERSAMPLE for contour in _simple_contours(corners)]
    polygons.sort(key=_polygon_area, reverse=True)
    return [
        polygon
        for position, polygon in enumerate(polygons)
        if position == 0 or _polygon_area(polygon) >= _MIN_PIECE
    ]


def _simple_contours(mask: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Trace the contours (n, 2) of a mask's regions, cut until none of them has a hole."""
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        if parent >= 0 and cv2.contourArea(contour) > SUPERSAMPLE**2:
            cut = int(contour[:, 0, 0].min() + contour[:, 0, 0].max()) // 2
            # Both halves keep the column of the cut, so that no gap opens between them.
            left, right = mask[:, : cut + 1], mask[:, cut:]
            moved = [part + np.array([cut, 0]) for part in _simple_contours(right.copy())]
            return _simple_contours(left.copy()) + moved
    outer = [c for c, links in zip(contours, hierarchy[0], strict=True) if links[3] < 0]
    simple = [cv2.approxPolyDP(contour, 1.0, True)[:, 0].astype(np.float64) for contour in outer]
    return [points for points in simple if len(points) >= 3]


def _polygon_area(polygon: NDArray[np.float64]) -> float:
    """Compute the area inside (n, 2) points by the shoelace formula."""
    x, y = polygon[:, 0], polygon[:, 1]
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def keypoint_records(
    scene: Scene, rendering: Rendering, instances: list[Record], size: int
) -> list[Record]:
    """Copy the persons' instance annotations, with ``keypoints`` and ``num_keypoints``."""
    records = []
    for number, (thing, instance) in enumerate(zip(scene.things, instances, strict=True), 1):
        if thing.category_id == PERSON_ID:
            keypoints = _keypoints(thing, number, rendering.things, size)
            labelled = sum(value > 0 for value in keypoints[2::3])
            records.append(instance | {"keypoints": keypoints, "num_keypoints": labelled})
    return records


def _keypoints(thing: Thing, number: int, things: NDArray[np.uint8], size: int) -> list[int]:
    """List 51 integers x, y, v. COCO's keypoints are whole pixels, unlike its polygons."""
    if thing.pose is None:  # a pebble, of which COCO would label nothing
        return [0] * (3 * len(KEYPOINTS))
    height, width = things.shape
    values: list[int] = []
    pixels = np.floor(thing.keypoints() * size).astype(int)
    for (x, y), allowed in zip(pixels.tolist(), thing.pose.visibility.tolist(), strict=True):
        if allowed == 0 or not (0 <= x < width and 0 <= y < height):
            values += [0, 0, 0]
        else:
            values += [x, y, allowed if things[y, x] == number else 1]
    return values


def panoptic_record(
    scene: Scene, rendering: Rendering, image_id: int
) -> tuple[Record, NDArray[np.uint8]]:
    """Make an image's panoptic annotation and PNG (H, W, 3), id = R + 256 G + 256² B."""
    png = np.zeros((*rendering.things.shape, 3), np.uint8)
    segments: list[Record] = []
    for number, thing in enumerate(scene.things, start=1):
        category = THINGS[thing.category_id - 1]
        _add_segment(segments, png, rendering.things == number, category)
    for category in STUFF:
        if category.id in scene.stuff:
            seen = (rendering.stuff == category.id) & (rendering.things == 0)
            _add_segment(segments, png, seen, category)
    record = {
        "image_id": image_id,
        "file_name": f"{image_id:012d}.png",
        "segments_info": segments,
    }
    return record, png


def _add_segment(
    segments: list[Record], png: NDArray[np.uint8], mask: NDArray[np.bool_], category: Category
) -> None:
    """Write a mask (H, W) into ``png`` in its category's colour, varied until it is new."""
    if not mask.any():
        return
    color = list(category.color)
    taken = {segment["id"] for segment in segments}
    while _segment_id(color) in taken:
        color[1] = (color[1] + 24) % 256
    png[mask] = color
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    segments.append(
        {
            "id": _segment_id(color),
            "category_id": category.id,
            "area": int(mask.sum()),
            "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
            "iscrowd": 0,
        }
    )


def _segment_id(color: list[int]) -> int:
    return color[0] + 256 * color[1] + 256**2 * color[2]


def caption_records(captions: list[str], image_id: int) -> list[Record]:
    """Make an image's entries of the captions file."""
    return [
        {"id": image_id * _IDS_PER_IMAGE + position, "image_id": image_id, "caption": caption}
        for position, caption in enumerate(captions, start=1)
    ]


def grounding_records(scene: Scene, image: Record, instances: list[Record]) -> dict[str, Records]:
    """Make an image's records for MMDetection's grounding files.

    Args:
        scene: of the image.
        image: the image's ``image_record``.
        instances: the image's ``instance_records``.

    Returns:
        "odvg": the one line of ODVGDataset's file; "flickr30k" and "refcoco": annotations of
        Flickr30kDataset's and MDETRStyleRefCocoDataset's files; "flickr30k_images" and
        "refcoco_images": these files' entries of ``images``.
    """
    mentioned = _mentionable(instances)
    phrases = caption_phrases(scene, mentioned, turn=image["id"])
    text, spans = caption(scene, phrases)
    tokens = [[list(span)] for span in spans]
    regions = [
        {
            "bbox": [_corners(instances[position]) for position in phrase.objects],
            "phrase": phrase.text,
            "tokens_positive": positive,
        }
        for phrase, positive in zip(phrases, tokens, strict=True)
    ]
    line = {
        "filename": image["file_name"],
        "height": image["height"],
        "width": image["width"],
        "grounding": {"caption": text, "regions": regions},
    }
    # Without phrases nothing can be measured, and Flickr30kMetric's recall is not defined. But a
    # training may learn from such an image.
    entries = [image | {"caption": text, "tokens_positive_eval": tokens}] if phrases else []
    boxes = [
        instances[position] | {"phrase_ids": number}
        for number, phrase in enumerate(phrases)
        for position in phrase.objects
    ]
    named = expressions(scene, mentioned, turn=image["id"])
    pairs = [
        _refcoco_pair(image, phrase.text, instances[phrase.objects[0]], number)
        for number, phrase in enumerate(named, start=1)
    ]
    return {
        "odvg": [line],
        "flickr30k": boxes,
        "flickr30k_images": entries,
        "refcoco": [annotation for _, annotation in pairs],
        "refcoco_images": [entry for entry, _ in pairs],
    }


def _refcoco_pair(
    image: Record, expression: str, instance: Record, number: int
) -> tuple[Record, Record]:
    """Make an expression an image of its own with one annotation, both with the same id."""
    unique = image["id"] * _IDS_PER_IMAGE + number
    entry = {
        "id": unique,
        "original_id": image["id"],
        "caption": f"{expression}.",
        "dataset_name": "refcoco",
    }
    return image | entry, instance | {
        "id": unique,
        "image_id": unique,
        "original_id": instance["id"],
    }


def _mentionable(instances: list[Record]) -> list[int]:
    """List the positions of the objects that are seen well enough."""
    sizes = (instance["bbox"][2:] for instance in instances)
    return [position for position, size in enumerate(sizes) if min(size) >= _MIN_MENTIONED]


def _corners(instance: Record) -> list[float]:
    x, y, width, height = instance["bbox"]
    return [x, y, x + width, y + height]
