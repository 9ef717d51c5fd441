"""Choosing the class and the modules of a detector to draw, and a baseline's feature map.

Messages name the options of tools/visualize_attention.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from plugin_core.block_plugins import BlockPlugin, child_name, registered_block_plugins
from plugin_core.inspection.attention_maps import Detector
from plugin_core.inspection.grad_cam import CAMS, grad_cam
from plugin_core.methods.ida import IDAClassifier

REGIONS = "ida-regions"
_SHORT = {"triplet_attention": "triplet", "ida": "ida-queries"}


def find_class(text: str | None, names: Sequence[str]) -> int | None:
    """Find a class by its name or id; raises ValueError, with likely names, if there is none."""
    if text is None:
        return None
    if text in names:
        return names.index(text)
    if text.isdecimal():
        if int(text) < len(names):
            return int(text)
        raise ValueError(
            f"--class {text}: the model has {len(names)} classes, 0 … {len(names) - 1}"
        )
    if names[0] == "0":
        raise ValueError(
            f"--class {text}: the classes' names are not known, give an id from 0 to "
            f"{len(names) - 1}; in Detectron2, --register-coco makes a config's dataset known"
        )
    likely = difflib.get_close_matches(text, names, cutoff=0.4) or names[:10]
    raise ValueError(f"--class {text}: there is no such class; such as {', '.join(likely)}")


def method_of(module: nn.Module) -> str | None:
    """Name the method that draws a module; None if it has no attention to draw."""
    if isinstance(module, IDAClassifier):
        return REGIONS
    if isinstance(module, BlockPlugin) and hasattr(module.module, "maps"):
        return _method_of_plugin(module.plugin_name)
    return None


def _method_of_plugin(name: str) -> str:
    return _SHORT.get(name, child_name(name))


def attention_names(detector: Detector) -> dict[str, list[str]]:
    """Name the modules that each method can draw: classifiers, and block plugins of the backbone.

    Block plugins elsewhere do not see the whole image.
    """
    found: dict[str, list[str]] = {}
    for name, module in detector.model.named_modules():
        method = method_of(module)
        if method is not None and (method == REGIONS or name.startswith("backbone.")):
            found.setdefault(method, []).append(name)
    return found


def choose_layers(
    detector: Detector, methods: Sequence[str] | None, layers: Sequence[str]
) -> dict[str, str]:
    """Choose the module that each method draws.

    Args:
        detector: detector to draw.
        methods: methods to draw; None for every method that fits a module of the detector.
        layers: names of modules to draw; a method without one gets its last module.

    Returns:
        Names of modules by method; Grad-CAMs first.

    Raises:
        ValueError: if a layer or a method is unknown, or two exclude one another.
    """
    modules = dict(detector.model.named_modules())
    found = attention_names(detector)
    chosen = {method: names[-1] for method, names in found.items()}
    cam_layer = None
    for name in layers:
        if name not in modules:
            known = [n for names in found.values() for n in names]
            likely = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
            raise ValueError(
                f"--layer {name}: the model has no such module; its attention: "
                f"{', '.join(known) or 'none'}; similar names: {', '.join(likely) or 'none'}"
            )
        method = method_of(modules[name])
        if method is None and cam_layer is not None:
            raise ValueError(f"--layer {name}: Grad-CAMs are made of one layer, and of {cam_layer}")
        if method is None:
            cam_layer = name
        elif name not in found.get(method, ()):
            raise ValueError(f"--layer {name}: it works on regions, not on the image")
        else:
            chosen[method] = name
    if methods is None:
        methods = [*CAMS, *chosen]
    for method in methods:
        if method not in CAMS and method not in chosen:
            raise ValueError(
                f"--methods {method}: the model has no {_kind(method)} for it; "
                f"there are {', '.join([*CAMS, *chosen])}"
            )
    if cam_layer is not None and not set(methods) & set(CAMS):
        raise ValueError(f"--layer {cam_layer}: no attention, and --methods leaves Grad-CAMs out")
    if set(methods) & set(CAMS):
        grad_cam("gradcam")
        if cam_layer is None:
            try:
                cam_layer = detector.last_stage()
            except ValueError as error:
                raise ValueError(f"{error}; name a --layer whose feature map to explain") from error
        chosen = dict.fromkeys(CAMS, cam_layer) | chosen
    return {method: name for method, name in chosen.items() if method in methods}


def _kind(method: str) -> str:
    kinds: dict[str, type[nn.Module]] = {REGIONS: IDAClassifier}
    kinds |= {_method_of_plugin(name): kind for name, kind in registered_block_plugins().items()}
    return kinds[method].__name__ if method in kinds else "module"


def choose_baseline_layer(
    detector: Detector, baseline: Detector, layers: Mapping[str, str], names: Sequence[str]
) -> str:
    """Name the baseline's feature map for Grad-CAMs.

    Args:
        detector: detector to compare with the baseline.
        baseline: another detector of the same classes.
        layers: from :func:`choose_layers`.
        names: layers that the user named.

    Raises:
        ValueError: if the two cannot be compared.
    """
    if baseline.reads_text:
        raise ValueError(
            f"--baseline: {type(baseline.model).__name__} reads a text, the model none"
        )
    first, second = detector.class_names, baseline.class_names
    if len(first) != len(second):
        raise ValueError(f"--baseline: it has {len(second)} classes, the model has {len(first)}")
    for mine, other in zip(first, second, strict=True):
        if mine != other and not (mine.isdecimal() or other.isdecimal()):
            raise ValueError(f"--baseline: it calls {other!r} what the model calls {mine!r}")
    layer = next((layers[method] for method in CAMS if method in layers), None)
    if layer is None:
        raise ValueError(f"--baseline: only for {' and '.join(CAMS)}, which --methods leaves out")
    if layer not in names:
        return baseline.last_stage()
    if layer not in dict(baseline.model.named_modules()):
        raise ValueError(f"--layer {layer}: the baseline has no such module")
    return layer
