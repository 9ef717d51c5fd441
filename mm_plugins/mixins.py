"""The base of the mixins that add a method to a detector of MMDetection."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, ClassVar

from mmdet.models.detectors import BaseDetector

from plugin_core.errors import ArgumentError

_SCORED = "is for detectors whose bbox_head or roi_head scores classes or phrases"
# The settings of the mixins, and what detectors each is for
_SETTINGS = MappingProxyType(
    {
        "batchformer": "is for detectors with a DETR encoder: DETRs, MaskFormer, Mask2Former",
        "attention_mask_consistency": _SCORED,
        "heatmap": _SCORED,
        "functional_entropy": "is for detectors that read a text: GroundingDINO and GLIP",
    }
)


class DetectorMixin(BaseDetector):
    """The base of mixins. They stand before the detector, in the order of ``place``.

    A setting of a mixin that the detector's class does not have is refused.

    Attributes:
        place: of a mixin among the others; a subclass of a mixin has the mixin's.

    Raises:
        TypeError: from a class whose bases are in another order.
    """

    place: ClassVar[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mixins = [kind for kind in cls.__mro__ if "place" in vars(kind)]
        right = sorted(mixins, key=lambda kind: vars(kind)["place"])
        last = cls.__mro__.index(mixins[-1]) if mixins else 0
        detectors = [
            kind
            for kind in cls.__mro__[:last]
            if issubclass(kind, BaseDetector) and not issubclass(kind, DetectorMixin)
        ]
        if mixins != right or detectors:
            names = ", ".join(kind.__name__ for kind in right)
            raise TypeError(
                f"{cls.__name__}: its bases must be {names} and then the detector, in this order, "
                f"got {', '.join(base.__name__ for base in cls.__bases__)}"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Mixins have taken what is theirs.
        for setting in _SETTINGS:
            if kwargs.pop(setting, None) is not None:
                raise not_for(self, setting)
        super().__init__(*args, **kwargs)


def not_for(detector: BaseDetector, setting: str) -> ArgumentError:
    """Make the error of a setting that the detector has no use for."""
    return ArgumentError(setting, f"{_SETTINGS[setting]}; {type(detector).__name__} is none")
