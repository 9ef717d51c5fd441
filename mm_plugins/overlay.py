"""Detectors with something laid over their class, whichever class that is."""

from __future__ import annotations

from typing import Any

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS

_MADE: dict[tuple[type, type], type] = {}


class Overlay(BaseDetector):
    """What is laid over a detector's class; derive from it."""

    prefix = ""  # of the made class's name

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made when it is asked for, so that pickle does not find it by its name.
        _, _, *rest = super().__reduce_ex__(protocol)  # a function, its arguments and the state
        overlay, kind = type(self).__bases__
        return _new, (overlay, kind), *rest


def detector_class(detector: str | type[BaseDetector]) -> type[BaseDetector]:
    """The class of a detector that a config names.

    Raises:
        ValueError: if there is no such detector.
    """
    kind = MODELS.get(detector) if isinstance(detector, str) else detector
    if not (isinstance(kind, type) and issubclass(kind, BaseDetector)):
        raise ValueError(
            f"detector: {detector!r} is no detector of MMDetection; name the type that the config "
            f"has without the plugin, such as 'DETR' or 'GroundingDINO'"
        )
    return kind


def lay_over(kind: type[BaseDetector], overlay: type[Overlay]) -> Any:
    """The class of a detector with something laid over it; the same one each time."""
    name = f"{overlay.prefix}{kind.__name__}"
    if (kind, overlay) not in _MADE:
        _MADE[kind, overlay] = type(name, (overlay, kind), {"__module__": overlay.__module__})
    return _MADE[kind, overlay]


def _new(overlay: type[Overlay], kind: type[BaseDetector]) -> BaseDetector:
    return object.__new__(lay_over(kind, overlay))
