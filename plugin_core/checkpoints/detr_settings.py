"""MMDetection's settings for a converted DETR, and a check of a model against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import nn

from plugin_core.checkpoints.detr_conversion import DetrConversion

_BATCHFORMER = "encoder.batchformer."


def describe(conversion: DetrConversion) -> str:
    """Say which detector was converted."""
    text = f"{conversion.detector} with ResNet-{conversion.settings['backbone']['depth']}"
    if conversion.batchformer:
        layers = conversion.batchformer["insert_after"]
        text += f" and {'shared ' if conversion.batchformer['share'] else ''}BatchFormer"
        text += (
            f" after encoder layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        )
    if conversion.lacks_masks:
        text += " for panoptic segmentation, boxes alone (it has no mask head: train it next)"
    return f"{text}, the original repository's names"


def model_settings(conversion: DetrConversion) -> dict[str, Any]:
    """List the settings to add to MMDetection's own config of the detector."""
    settings = {"type": conversion.detector, **conversion.settings}
    if "panoptic_head" in settings:
        settings["panoptic_head"] = {"type": "DETRPanopticHead", **settings["panoptic_head"]}
    if conversion.batchformer:
        settings |= {
            "type": f"Plugin{conversion.detector}",
            "batchformer": conversion.batchformer,
        }
    return settings


def as_config(value: Any) -> str:
    """Write a value as MMDetection's configs have it."""
    if not isinstance(value, Mapping):
        return repr(value)
    return f"dict({', '.join(f'{name}={as_config(inner)}' for name, inner in value.items())})"


def check_detr(conversion: DetrConversion, model: nn.Module) -> None:
    """Check that a model has the settings of the weights' training; raises ValueError."""
    places = model.state_dict()
    # The strides of a DC5 model, which no tensor tells, count in both directions.
    backbone = {"strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1), "contract_dilation": False}
    backbone |= {n: v for n, v in conversion.settings["backbone"].items() if n != "type"}
    wanted = {**conversion.settings, "backbone": backbone}
    wrong = [
        f"{setting} is {found!r}, not {value!r}"
        for setting, value in _flat(wanted)
        if (found := _attribute(model, setting)) not in (value, None)
    ]
    for name, tensor in conversion.tensors.items():
        if name not in places:
            if not name.startswith(_BATCHFORMER):
                wrong.append(f"there is no {name}")
        elif places[name].shape != tensor.shape:
            wrong.append(f"{name} is {tuple(places[name].shape)}, not {tuple(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more differences" if len(wrong) > 3 else ""
        raise ValueError(
            f"the model is not that of the weights: {'; '.join(wrong[:3])}{more}. They need "
            f"model = {as_config(model_settings(conversion))}. To fine-tune on other classes "
            "convert without --config: MMDetection leaves out a classifier that does not fit"
        )


def _attribute(model: nn.Module, path: str) -> Any:
    """Read a setting off a built model, a list as a tuple; None if the model does not keep it."""
    try:
        value = attrgetter(path)(model)
    except AttributeError:
        return False if path.endswith(".contract_dilation") else None  # a plain ResNet does not
    return tuple(value) if isinstance(value, list) else value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
