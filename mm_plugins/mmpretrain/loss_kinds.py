"""How many labels an image a classification loss takes."""

from __future__ import annotations

from mmpretrain.models.losses import AsymmetricLoss, FocalLoss
from torch import nn

from plugin_core.errors import ArgumentError

_RIGHT = {
    "one": "for one label in an image, such as dict(type='CrossEntropyLoss')",
    "several": (
        "for several labels in an image, such as dict(type='CrossEntropyLoss', use_sigmoid=True) "
        "or dict(type='AsymmetricLoss')"
    ),
}


def check_loss(loss: nn.Module, labels: str) -> None:
    """Check that a loss is for what a head gives it.

    In a loss for one label the classes compete, as by softmax. In one for several, each class has a
    sigmoid. A loss that says nothing of this passes.

    Args:
        loss: of a head.
        labels: of an image, "one" or "several".

    Raises:
        ArgumentError: of ``loss``, if it is for the other.
    """
    sigmoid = getattr(getattr(loss, "ce", loss), "use_sigmoid", None)  # ce: of label smoothing
    mode = getattr(loss, "mode", None)
    takes = {"one", "several"} if sigmoid is None else {"several" if sigmoid else "one"}
    if isinstance(loss, (AsymmetricLoss, FocalLoss)) or mode == "multi_label":
        takes &= {"several"}  # they compare a number for each class
    elif mode is not None:
        takes = {"one"}  # label smoothing makes the numbers itself
    if labels in takes:
        return
    given = type(loss).__name__ + ("" if sigmoid is None else f" with use_sigmoid={sigmoid}")
    given += "" if mode is None else f" and mode={mode!r}"
    raise ArgumentError("loss", f"must be {_RIGHT[labels]}, got {given}")
