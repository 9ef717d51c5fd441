"""Checks of a config's panoptic datasets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from mm_plugins.dataset_nodes import DatasetNode, classes_of, names_in
from mm_plugins.launch import is_main
from plugin_core.datasets.classes import check_number_of_classes
from plugin_core.datasets.findings import ERROR, WARNING, DatasetError, Report
from plugin_core.datasets.panoptic import PanopticReport, check_panoptic
from plugin_core.errors import did_you_mean


def check_panoptic_dataset(dataset: DatasetNode, model: Any, *, train: bool) -> list[str]:
    """Check a panoptic dataset, its classes and the detector's numbers of them; list mistakes."""
    where = f"{dataset.setting}.ann_file"
    for key, folder in (("img", dataset.images), ("seg", dataset.segments)):
        if folder is not None and not os.path.isdir(folder):
            return [f"{dataset.setting}.data_prefix.{key}: there is no folder {folder!r}"]
    classes, setting = classes_of(dataset)
    try:
        report = check_panoptic(dataset.ann_file, dataset.segments, dataset.images)
    except ValueError as error:
        return [f"{where}: {error}"]
    for finding in report.findings:
        if train and finding.kind == "no-segments":
            finding.level = ERROR
    _check_panoptic_classes(report, classes, dataset, setting)
    isthing = {category.name: category.isthing for category in report.categories}
    texts = []
    if set(classes) <= isthing.keys():
        owner = "panoptic_head" if hasattr(model, "panoptic_head") else "panoptic_fusion_head"
        for kind in ("things", "stuff"):
            names = [name for name in classes if isthing[name] == (kind == "things")]
            number = getattr(model, f"num_{kind}_classes", None)
            if isinstance(number, int):
                place = f"model.{owner}.num_{kind}_classes"
                texts.append(check_number_of_classes(number, names, place))
    if report.of(ERROR, "mmdetection"):
        texts.append(str(DatasetError(where, report, "mmdetection")))
    elif is_main() and (warnings := report.text("mmdetection", (WARNING,))):
        print(f"{where}:\n{warnings}", file=sys.stderr, flush=True)
    return [text for text in texts if text]


def check_panoptic_evaluators(
    datasets: Sequence[DatasetNode], evaluators: Iterable[tuple[str, Any]], model: Any
) -> list[str]:
    """List what is wrong with the evaluators of a loader's panoptic datasets.

    They have to read a dataset's file and folder, and a model that computes masks.
    """
    texts = []
    for setting, evaluator in evaluators:
        if getattr(model, "trains", None) == "boxes":
            texts.append(
                f"{setting}: evaluates segments, which a model with model.trains='boxes' does not "
                "have; take 'CocoMetric', or leave the evaluation out"
            )
        for key in ("ann_file", "seg_prefix"):
            attribute = "ann_file" if key == "ann_file" else "segments"
            read = {dataset.setting: getattr(dataset, attribute) for dataset in datasets}
            own = {place: path for place, path in read.items() if path is not None}
            value = evaluator.get(key)
            if not isinstance(value, str) or not own:
                continue
            if os.path.realpath(value) not in map(os.path.realpath, own.values()):
                place, path = next(iter(own.items()))
                texts.append(
                    f"{setting}.{key}: {value!r} is not what {place} reads, {path!r}; name the same"
                )
    return texts


def _check_panoptic_classes(
    report: PanopticReport, classes: Sequence[str], dataset: DatasetNode, setting: str
) -> None:
    """Check the classes of a panoptic dataset against the categories of its file.

    MMDetection counts labels by the order of the categories in the file.
    """
    default = dataset.kind.METAINFO  # type: ignore[attr-defined]
    meta = {**default, **(dataset.node.get("metainfo") or {})}
    things, stuff = (set(names_in(meta.get(f"{k}_classes")) or ()) for k in ("thing", "stuff"))
    known = {category.name: category for category in report.categories}
    missing = [name for name in classes if name not in known]
    others = [name for name in known if name not in classes]
    _add(
        report,
        "class-names",
        f"classes of {setting} that are no category of the file",
        [f"{name!r}{did_you_mean(name, others)}" for name in missing],
        "counts the labels without them, and so gives others",
        f"the file's are {tuple(known)!r:.300}",
    )
    _add(
        report,
        "class-left-out",
        f"categories with segments that {setting} does not have",
        [
            f"{name!r} ({known[name].segments:,} segments)"
            for name in others
            if known[name].segments
        ],
        "stops with a KeyError while it loads the file",
        "list them as classes, or take their segments out",
    )
    order = [name for name in known if name in classes]
    if not missing and order != list(classes):
        _add(
            report,
            "class-order",
            f"the order of the categories in the file is another one than that of {setting}",
            [
                f"{name!r} for {own!r}"
                for own, name in zip(classes, order, strict=True)
                if own != name
            ],
            "takes objects of one class for another",
            "list both in the same order, things first",
        )
    listed = [known[name] for name in classes if name in known]
    late = [b.name for a, b in zip(listed, listed[1:], strict=False) if b.isthing > a.isthing]
    _add(
        report,
        "things-first",
        f"things after stuff in {setting}",
        [repr(name) for name in late],
        "takes the first labels for things, and so learns some as stuff",
        "list things first, in the file as well",
    )
    mixed = [c for c in listed if c.name in (stuff if c.isthing else things)]
    _add(
        report,
        "thing-or-stuff",
        f"things that {dataset.setting}.metainfo lists as stuff, or stuff as things",
        [f"{c.name!r} (isthing {int(c.isthing)} in the file)" for c in mixed],
        "evaluates them as the other kind",
        "set thing_classes and stuff_classes to what isthing says",
    )
    neither = [c for c in listed if c.isthing and c.name not in things and c not in mixed]
    _add(
        report,
        "thing-not-listed",
        f"things that {dataset.setting}.metainfo.thing_classes does not have",
        [repr(c.name) for c in neither],
        "evaluates them as stuff where the evaluator has no ann_file",
        level=WARNING,
    )


def _add(
    report: Report,
    kind: str,
    what: str,
    places: Sequence[str],
    left: str,
    remedy: str = "",
    level: str = ERROR,
) -> None:
    report.add(kind, level, what, places, left={"mmdetection": left}, remedy=remedy)
