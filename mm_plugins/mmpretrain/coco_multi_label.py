"""Several labels of an image, read from the instances files of COCO."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmengine.fileio import get_local_path
from mmpretrain.datasets import MultiLabelDataset
from mmpretrain.registry import DATASETS

from plugin_core.datasets.coco_file import CocoFile, read_coco, sort_categories
from plugin_core.datasets.records import is_crowd, is_id
from plugin_core.errors import ArgumentError, check_bool, did_you_mean, few


@DATASETS.register_module()
class CocoMultiLabel(MultiLabelDataset):
    """Images with the classes of their objects, from a file in COCO's instances format.

    Labels are places in the list of classes. Without ``metainfo`` or ``classes``, these are the
    file's categories by their ids, for COCO 0 … 79. Given classes are the file's categories by
    name, and objects of others count as none. Images come in the order of their ids.

    Images without an object are kept, as the public reproduction of IDA does. Some published
    numbers are of trainings without them: ``filter_cfg=dict(filter_empty_gt=True)``, which as in
    MMDetection does nothing with ``test_mode``.

    Args:
        ann_file: path of the file, below ``data_root``.
        crowds: whether a crowd's annotation tells a label, as in the reproduction.
        **kwargs: of ``MultiLabelDataset``. ``data_prefix`` is the folder of the images.

    Raises:
        ValueError: when it is loaded: if the file is missing, is no JSON, or has no images, wrong
            ids or names.
        ArgumentError: if ``crowds`` or ``filter_cfg`` is wrong; when it is loaded: if ``classes``
            names no category, one twice, or none at all, or nothing is left to train on.
    """

    def __init__(self, ann_file: str, *, crowds: bool = True, **kwargs: Any) -> None:
        check_bool(crowds=crowds)
        _check_filter(kwargs.get("filter_cfg"))
        self.crowds = crowds
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the file: ``img_path`` and ``gt_label``, sorted labels, of each image."""
        with get_local_path(self.ann_file) as path:
            content = read_coco(path)
        where = f"annotation file {self.ann_file!r}"
        for name in ("images", "annotations", "categories"):
            if name in content.absent:
                raise ValueError(f"{where} has no {name!r}; COCO's instances format has it")
        if not content.images or not content.categories:
            missing = "categories" if content.images else "images"
            raise ValueError(f"{where} has no {missing} in its list of {missing}")
        labels_of = self._labels_of_categories(content, where)
        names = {i.id: i.file_name for i in content.images if is_id(i.id)}
        if len(names) < len(content.images):
            raise ValueError(f"{where} has two images of the same id, or one without an id")
        found: dict[Any, set[int]] = {image_id: set() for image_id in names}
        for annotation in content.annotations:
            ids = annotation.image_id, annotation.category_id
            if not all(map(is_id, ids)) or ids[0] not in found or ids[1] not in labels_of:
                raise ValueError(
                    f"{where}: annotation {annotation.id!r} is of image {annotation.image_id!r} "
                    f"and category {annotation.category_id!r}, and the file lacks one of them"
                )
            label = labels_of[annotation.category_id]
            if label is not None and (self.crowds or not is_crowd(annotation)):
                found[annotation.image_id].add(label)
        data_list = []
        for image_id in sorted(found, key=lambda key: (isinstance(key, str), key)):
            name = names[image_id]
            if not isinstance(name, str) or not name:
                raise ValueError(f"{where}: image {image_id!r} has no file_name, but {name!r}")
            path = os.path.join(self.img_prefix or "", name)
            data_list.append({"img_path": path, "gt_label": sorted(found[image_id])})
        return data_list

    def _labels_of_categories(self, content: CocoFile, where: str) -> dict[Any, int | None]:
        """Map each category's id to its label, None for one that is no class; set the classes."""
        categories = {c.id: c.name for c in sort_categories(content.categories) if is_id(c.id)}
        if len(categories) < len(content.categories):
            raise ValueError(f"{where} has two categories of the same id, or one without an id")
        names = [name for name in categories.values() if isinstance(name, str)]
        if len(set(names)) < len(categories):
            raise ValueError(f"{where} has two categories of the same name, or one without a name")
        if self.CLASSES is None:
            self._metainfo["classes"] = tuple(names)
        if not self.CLASSES or len(set(self.CLASSES)) < len(self.CLASSES):
            given = few(map(repr, self.CLASSES)) or "none"
            raise ArgumentError(
                "metainfo.classes", f"must be categories, each of them once, got {given}"
            )
        unknown = [name for name in self.CLASSES if name not in names]
        if unknown:
            hints = [f"{name!r}{did_you_mean(name, names)}" for name in unknown]
            raise ArgumentError(
                "metainfo.classes",
                f"must be categories of {self.ann_file!r}, which are "
                f"{few(map(repr, names))}; got {few(hints)}",
            )
        labels = self.class_to_idx
        return {category_id: labels.get(name) for category_id, name in categories.items()}

    def filter_data(self) -> list[dict[str, Any]]:
        """Leave out images without an object if ``filter_cfg`` says so."""
        if self.test_mode or not (self.filter_cfg or {}).get("filter_empty_gt", False):
            return list(self.data_list)
        kept = [info for info in self.data_list if info["gt_label"]]
        if not kept:
            raise ArgumentError(
                "filter_cfg",
                f"filter_empty_gt=True leaves none of the {len(self.data_list)} images, of which "
                "none has an object of the classes",
            )
        return kept


def _check_filter(filter_cfg: Any) -> None:
    if filter_cfg is None:
        return
    if not isinstance(filter_cfg, Mapping):
        raise ArgumentError(
            "filter_cfg", f"must be None or dict(filter_empty_gt=True), got {filter_cfg!r}"
        )
    for key, value in filter_cfg.items():
        if key != "filter_empty_gt":
            hint = did_you_mean(key, ["filter_empty_gt"])
            raise ArgumentError(f"filter_cfg.{key}", f"is no key; there is filter_empty_gt{hint}")
        check_bool(**{f"filter_cfg.{key}": value})
