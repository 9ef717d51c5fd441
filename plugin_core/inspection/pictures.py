"""Drawing a detector's attention in a detection, as rows of a sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from plugin_core.block_plugins import BlockPlugin
from plugin_core.inspection.attention_maps import Detector, Run, region_attention, run
from plugin_core.inspection.choices import method_of
from plugin_core.inspection.grad_cam import CAMS, cam_panels
from plugin_core.inspection.sheets import Panel, Row, overlay, with_box

SHOWN = 4  # most maps of a block plugin


def explain(
    detector: Detector,
    path: str,
    class_id: int | None,
    layers: Mapping[str, str],
    baseline: Detector | None = None,
    baseline_layer: str | None = None,
    *,
    warn: Callable[[str], None],
) -> list[Row]:
    """Draw every possible row of an image's sheet.

    Args:
        detector: detector to explain.
        path: of the image.
        class_id: class whose best detection is explained; None for the best of all classes.
        layers: modules to draw, from :func:`plugin_core.inspection.choices.choose_layers`.
        baseline: another detector; its Grad-CAMs are drawn below.
        baseline_layer: feature map of the baseline's Grad-CAMs.
        warn: called with a message for each row that cannot be drawn.

    Raises:
        ValueError: if nothing can be drawn.
    """
    failures: list[str] = []

    def attempt(make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except ValueError as error:
            failures.append(str(error))
            return []

    modules = {method: detector.model.get_submodule(name) for method, name in layers.items()}
    done = run(detector, detector.read(path), modules.values())
    index = done.detections.best(class_id)
    if index is None:
        raise ValueError(no_detection(detector, done, class_id))
    class_id = int(done.detections.classes[index])
    cams = [method for method in layers if method in CAMS]
    rows = [detection_row(detector.what, detector, done, index)]
    if cams:
        rows[0].panels += attempt(cam_panels, detector, done, index, layers[cams[0]], cams)
    if baseline is not None and baseline_layer is not None:
        plain = run(baseline, baseline.read(path), [baseline.model.get_submodule(baseline_layer)])
        best = plain.detections.best(class_id)
        if best is None:
            warn(f"{path}: baseline: {no_detection(baseline, plain, class_id)}")
        else:
            rows.append(detection_row("baseline", baseline, plain, best))
            panels = attempt(cam_panels, baseline, plain, best, baseline_layer, cams)
            rows[-1].panels += [Panel(p.title, p.picture, f"baseline_{p.file}") for p in panels]
    for method, module in modules.items():
        if method not in CAMS:
            draw = plugin_row if isinstance(module, BlockPlugin) else regions_row
            row = attempt(draw, detector, done, index, layers[method])
            rows += [row] if row else []
    if len(rows) == len(rows[0].panels) == 1:
        raise ValueError("; ".join(failures))
    for failure in failures:
        warn(f"{path}: {failure}")
    return rows


def no_detection(detector: Detector, done: Run, class_id: int | None) -> str:
    """Say that a class is not detected, and list the detected ones."""
    what = "no detection" if class_id is None else f"no {label(detector, class_id)}"
    best = [(k, done.detections.best(k)) for k in range(len(detector.class_names))]
    scores = done.detections.scores
    others = [f"{label(detector, k)} {scores[i].item():.2f}" for k, i in best if i is not None]
    hint = f"found are {', '.join(others[:8])}; choose by --class" if others else "nothing is found"
    return f"{what} above the score threshold of the config's test; {hint}"


def label(detector: Detector, class_id: int) -> str:
    """Name a class."""
    name = detector.class_names[class_id]
    return f"class {name}" if name.isdecimal() else name


def detection_row(title: str, detector: Detector, done: Run, index: int) -> Row:
    """Start a row with the image and the detection's box."""
    found = done.detections
    about = f"{label(detector, int(found.classes[index]))}, score {found.scores[index].item():.2f}"
    return Row(title, [Panel(about, with_box(done.picture.image, found.boxes[index]))])


def plugin_row(detector: Detector, done: Run, index: int, name: str) -> Row:
    """Draw the maps of a block plugin; if there are many, the ones most in the detection's box.

    Raises:
        ValueError: if the plugin offers no maps for its input.
    """
    plugin: Any = detector.model.get_submodule(name)
    with torch.no_grad():
        maps = {what: x[0] for what, x in plugin.maps(done.call_of(plugin).args[0]).items()}
    if not maps:
        raise ValueError(f"layer {name}: it offers no maps of its attention")
    box, about = done.detections.boxes[index], {}
    alpha = "" if plugin.alpha is None else f", alpha {plugin.alpha.item():.2g}"
    title = f"{plugin.plugin_name.replace('_', ' ')}{alpha}\n{name}"
    file = method_of(plugin)
    if len(maps) > SHOWN:
        shares = {what: float(done.frame.share_in_box(x, box)) for what, x in maps.items()}
        order = sorted(maps, key=lambda what: -shares[what])[:SHOWN]
        about = {what: f"{shares[what]:.1%} of it in the box" for what in order}
        even = float(done.frame.share_in_box(torch.ones_like(maps[order[0]]), box))
        title += f"\nthe box is {even:.1%} of the input"
    else:
        about = {what: extent(x) for what, x in maps.items()}
        file = f"{file}-{next(iter(maps)).partition(',')[0].split()[-1]}"
    row = Row(title)
    for what, values in about.items():
        picture = overlay(done.picture.image, done.frame.over_image(maps[what]), box)
        row.panels.append(Panel(f"{what}\n{values}", picture, None if row.panels else file))
    return row


def regions_row(detector: Detector, done: Run, index: int, name: str) -> Row:
    """Draw where each head of IDA's classifier looks in the region, for the detection's class."""
    module: Any = detector.model.get_submodule(name)
    try:
        maps, region = region_attention(detector, done, module, index)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    row, box = Row(f"IDA in the region\n{name}"), done.detections.boxes[index]
    maps = torch.cat((maps.mean(0, keepdim=True), maps))
    for head, (map_, values) in enumerate(zip(done.frame.paste(maps, region), maps, strict=True)):
        title = f"head {head}" if head else "mean over heads"
        picture = overlay(done.picture.image, map_, box)
        file = None if head else method_of(module)
        row.panels.append(Panel(f"{title}\n{extent(values)}", picture, file))
    return row


def extent(values: torch.Tensor) -> str:
    """Write the least and the greatest value."""
    return f"{float(values.min()):.3g} … {float(values.max()):.3g}"
