"""Datasets of phrases that a detector reads alone, one in each text."""

from __future__ import annotations

from typing import Any

from mmdet.datasets import Flickr30kDataset, RefCocoDataset
from mmdet.registry import DATASETS
from mmengine.fileio import join_path, load


@DATASETS.register_module()
class Flickr30kPhraseDataset(Flickr30kDataset):
    """``Flickr30kDataset`` with each phrase alone: an image comes once for each of its phrases.

    A phrase's text is the phrase, in lower case, without the rest of the caption. AMC's authors
    evaluate like this (arXiv:2206.15462).
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        return [
            alone for of_image in super().load_data_list() for alone in _phrases_alone(of_image)
        ]


def _phrases_alone(of_image: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for number in sorted(set(of_image["phrase_ids"])):
        spans = of_image["tokens_positive"][number]
        text = " ".join(of_image["text"][begin:end] for begin, end in spans).lower()
        instances = [
            instance
            for instance, phrase in zip(of_image["instances"], of_image["phrase_ids"], strict=True)
            if phrase == number
        ]
        found.append(
            {
                **of_image,
                "text": text,
                "phrases": [text],
                "tokens_positive": [[[0, len(text)]]],
                "phrase_ids": [0] * len(instances),
                "instances": instances,
            }
        )
    return found


@DATASETS.register_module()
class ReferDataset(RefCocoDataset):
    """Boxes of referring expressions in the files of REFER, https://github.com/lichengunc/refer.

    These are RefCLEF's and RefCOCO's as they are published. An image comes once for each of its
    expressions, as in ``MDETRStyleRefCocoDataset``, with the expression as text.

    Args:
        data_root: as of ``RefCocoDataset``, and so are the others.
        ann_file: JSON with the images and their annotations.
        split_file: pickle with the expressions, such as ``refs(unc).p``.
        split: such as "val".
        data_prefix: with ``img_path``.

    Raises:
        ValueError: if there is no such split.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        self.splits = load(self.split_file, file_format="pkl")
        self.instances = load(self.ann_file, file_format="json")
        self._init_refs()
        images = {image["id"]: image for image in self.instances["images"]}
        found = []
        for number, ref in self.refs.items():
            if ref["split"] != self.split:
                continue
            image, annotation = images[ref["image_id"]], self.ref_to_ann[number]
            x, y, width, height = annotation["bbox"]
            instance = {
                "bbox": [x, y, x + width, y + height],
                "bbox_label": annotation["category_id"],
                "ignore_flag": 0,
            }
            for sentence in ref["sentences"]:
                found.append(
                    {
                        "img_path": join_path(self.data_prefix["img_path"], image["file_name"]),
                        "img_id": image["id"],
                        "height": image["height"],
                        "width": image["width"],
                        "text": sentence["raw"].lower(),
                        "custom_entities": False,
                        "tokens_positive": -1,  # the whole text is one phrase
                        "instances": [instance],
                    }
                )
        if not found:
            splits = ", ".join(sorted({ref["split"] for ref in self.refs.values()}))
            raise ValueError(
                f"ReferDataset: split must be one of {self.split_file}, which has {splits}, "
                f"got {self.split!r}"
            )
        return found
