"""Explaining a detection's score by Grad-CAM, with the package grad-cam."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.inspection.attention_maps import (
    Detections,
    Detector,
    Picture,
    Run,
    check_depends_on,
)
from plugin_core.inspection.sheets import Panel, overlay

CAMS = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus"}  # classes of pytorch_grad_cam


def grad_cam(method: str) -> Callable[..., Any]:
    """Import a class of grad-cam; raises ValueError with the command to install it."""
    try:
        library = importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        raise ValueError(
            f"Grad-CAMs need the package grad-cam: pip install -e .[visualization], or leave them "
            f"out by --methods ({error})"
        ) from error
    return getattr(library, CAMS[method])


def cam_panels(
    detector: Detector, done: Run, index: int, layer: str, methods: Sequence[str]
) -> list[Panel]:
    """Draw the class activation maps of a detection.

    Args:
        detector: detector that made the detection.
        done: run that recorded the layer.
        index: of the detection.
        layer: name of the module whose feature map is explained.
        methods: of ``CAMS``.

    Raises:
        ValueError: if the layer puts out no feature map, or the score does not depend on it.
    """
    module = detector.model.get_submodule(layer)
    try:
        check_depends_on(done, module, index)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    panels = []
    for method in methods:
        heat = make_cam(method, detector, done, index, module)
        title = method.replace("gradcam", "Grad-CAM") + ("" if heat.any() else ", nowhere above 0")
        picture = overlay(done.picture.image, heat, done.detections.boxes[index])
        panels.append(Panel(f"{title}\n{layer}", picture, method))
    return panels


class _DetectorOfPadded(nn.Module):
    """A detector as grad-cam calls it: a padded image in, the detections of each image out."""

    def __init__(self, detector: Detector, picture: Picture) -> None:
        super().__init__()
        self.detector = detector.model
        self.detect = partial(detector.detect, picture)
        self.size = picture.pixels.shape[2:]

    def forward(self, padded: Tensor) -> list[Detections]:
        return [self.detect(padded[..., : self.size[0], : self.size[1]])]


def make_cam(method: str, detector: Detector, done: Run, index: int, layer: nn.Module) -> Tensor:
    """Compute the class activation map of a detection's score: (H, W) over the image, 0 … 1."""
    # grad-cam stretches the map over the model's input. So give the model the padded image.
    pixels = done.picture.pixels
    (height, width), (rows, columns) = pixels.shape[2:], done.frame.padded_size
    padded = F.pad(pixels, (0, columns - width, 0, rows - height)).requires_grad_()
    class_id = int(done.detections.classes[index])

    def score(detections: Detections) -> Tensor:
        return detections.scores[detections.best(class_id)]

    # A copy, as later layers may change the map in place.
    model = _DetectorOfPadded(detector, done.picture)
    cam = grad_cam(method)(model, [layer], reshape_transform=torch.clone)
    try:
        return done.frame.over_image(torch.from_numpy(cam(padded, [score]))[0])
    finally:
        cam.activations_and_grads.release()
