"""Maps over an image of a detector's attention in a detection.

A framework's side runs its detectors (:class:`Detector`). :func:`run` records the calls of modules
by hooks, which it removes afterwards. :class:`Frame` lays maps over the image.

Sizes are (height, width) and boxes (x1, y1, x2, y2), in pixels of the image file unless another
unit is given. The cells of a map (..., H', W') of features divide the padded input evenly.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.inspection.recorder import Call, record_calls
from plugin_core.methods.ida import IDAClassifier

logger = logging.getLogger(__name__)

Size = tuple[int, int]
# A checkpoint may have or lack these: constants of older Detectron2, and the norms' counter.
_OPTIONAL = {"pixel_mean", "pixel_std", "cell_anchors", "num_batches_tracked"}


@dataclass(frozen=True)
class Picture:
    """An image, and a detector's input made from it.

    Args:
        image: (H, W, 3), RGB, 0 … 255.
        pixels: (1, 3, h, w), float, 0 … 255: the resized image, in the detector's channel order.
        input_size: the part of ``pixels`` that the image fills.
        meta: other data that the framework needs to run.
    """

    image: np.ndarray
    pixels: Tensor
    input_size: Size
    meta: Any = None


@dataclass(frozen=True)
class Detections:
    """The D objects that a detector found in one image.

    Args:
        boxes: (D, 4).
        scores: (D,), with gradients.
        classes: (D,), counted from 0.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def best(self, class_id: int | None = None) -> int | None:
        """Find the highest score's index, in one class or all; None if there is no detection."""
        wanted = torch.ones_like(self.classes, dtype=torch.bool)
        if class_id is not None:
            wanted = self.classes == class_id
        if not wanted.any():
            return None
        return int(self.scores.detach().masked_fill(~wanted, -torch.inf).argmax())


@dataclass(frozen=True)
class Caption:
    """The text that a detector reads, and the phrases in it that it looks for.

    Args:
        phrases: without spaces and full stops at their ends.
        text: holds each phrase, in upper or lower case; None to read just the phrases.

    Raises:
        ValueError: if there is no phrase, a phrase is empty, or the text does not hold it.
    """

    phrases: tuple[str, ...]
    text: str | None = None

    def __post_init__(self) -> None:
        if not self.phrases or not all(self.phrases):
            raise ValueError("it is empty; give words to look for")
        if self.text is not None:
            self.spans()

    def spans(self) -> list[tuple[int, int]]:
        """Find the characters (start, end) of each phrase in the text, as whole words first."""
        spans = []
        for phrase in self.phrases:
            same = re.escape(phrase)
            patterns = (rf"(?<!\w){same}(?!\w)", same)
            found = (re.search(pattern, self.text or "", re.IGNORECASE) for pattern in patterns)
            match = next(filter(None, found), None)
            if match is None:
                raise ValueError(f"{phrase!r} does not occur in the text {self.text!r}")
            spans.append(match.span())
        return spans


@dataclass(frozen=True)
class Grounding:
    """The phrases of a caption, found in one image.

    Args:
        detections: the class of a detection is the number of its phrase.
        heatmaps: (phrases, H, W), 0 … 1, over the image.
        layer: name of the module whose activation the heatmaps explain.
    """

    detections: Detections
    heatmaps: Tensor
    layer: str


# Finds a caption's phrases in a picture; raises ValueError if there is no heatmap.
Grounder = Callable[[Picture], Grounding]


class Detector(ABC):
    """A trained detector of either framework, in evaluation mode.

    Attributes:
        model: has a child ``backbone``, and no parameter that needs a gradient.
        class_names: names of the classes, or "0", "1", … where they have none; empty if the
            detector reads a text.
        reads_text: whether it looks for the phrases of a text.
        batch_size: number of images in a batch of the config's test.
        what: it is, in a word.
    """

    what: str = "detector"
    model: nn.Module
    class_names: tuple[str, ...]
    reads_text: bool = False
    batch_size: int = 1

    @abstractmethod
    def read(self, path: str) -> Picture:
        """Read and resize an image as the config's test does; raises ValueError if it cannot."""

    @abstractmethod
    def detect(self, picture: Picture, pixels: Tensor) -> Detections:
        """Detect in ``pixels``, those of the picture or others of their shape."""

    def evaluate(self, pictures: Sequence[Picture]) -> None:
        """Detect in a batch of pictures as the framework's own evaluation does."""
        raise ValueError(f"a {self.what} is not evaluated in batches")

    def grounder(self, caption: Caption, layer: str | None = None) -> Grounder:
        """Make a function that finds a caption's phrases in a picture.

        Args:
            caption: the text to read.
            layer: name of the module whose activation the heatmaps explain; None for the default.

        Raises:
            ValueError: if the detector reads no text or a shorter one, or has no such layer.
        """
        raise ValueError(f"{type(self.model).__name__} reads no text")

    @abstractmethod
    def last_stage(self) -> str:
        """Name the backbone's last stage; raises ValueError if the backbone has no stages."""

    @abstractmethod
    def region_extractors(self) -> list[nn.Module]:
        """List the modules that cut out the features of regions."""

    @abstractmethod
    def regions(self, call: Call) -> Tensor:
        """Read the boxes (R, 4), in pixels of the input, off a region extractor's call."""


@dataclass(frozen=True)
class Frame:
    """The place of an image in the maps that a network computes.

    Args:
        image_size: size of the file.
        input_size: size that the image was resized to.
        padded_size: size of the network's input, which is padded on the right and at the bottom.
    """

    image_size: Size
    input_size: Size
    padded_size: Size

    def over_image(self, maps: Tensor) -> Tensor:
        """Lay maps (..., H', W') of features over the image, bilinearly: (..., H, W)."""
        padded = _resize(maps, self.padded_size)
        height, width = self.input_size
        return _resize(padded[..., :height, :width], self.image_size)

    def paste(self, maps: Tensor, region: Tensor) -> Tensor:
        """Lay maps (..., h, w) of a region over the image: (..., H, W), NaN outside the region.

        Args:
            maps: their cells divide the region evenly.
            region: box of the region, in pixels of the input.
        """
        scale = torch.tensor([i / n for i, n in zip(self.image_size, self.input_size, strict=True)])
        y1, x1, y2, x2 = (region.detach().cpu()[[1, 0, 3, 2]] * scale.repeat(2)).tolist()
        height, width = self.image_size
        # Place of each pixel's middle in the region, which goes from -1 to 1
        v = (torch.arange(height) + 0.5 - y1) / max(y2 - y1, 1e-6) * 2 - 1
        u = (torch.arange(width) + 0.5 - x1) / max(x2 - x1, 1e-6) * 2 - 1
        grid = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=2)[None]
        flat = maps.detach().float().cpu().reshape(1, -1, *maps.shape[-2:])
        pasted = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
        outside = (v.abs()[:, None] > 1) | (u.abs() > 1)
        pasted = pasted.masked_fill(outside, torch.nan)
        return pasted.reshape(*maps.shape[:-2], height, width)

    def share_in_box(self, maps: Tensor, box: Tensor) -> Tensor:
        """Measure how much of maps (..., H', W') is in a box of the image: (...), 0 … 1."""
        maps, covered = maps.detach().float().cpu(), []
        for axis, (first, last) in enumerate(((1, 3), (0, 2))):
            cells = maps.shape[axis - 2]
            scale = self.input_size[axis] / self.image_size[axis] * cells / self.padded_size[axis]
            start = torch.arange(cells)
            end = (start + 1).clamp(max=float(box[last]) * scale)
            covered.append((end - start.clamp(min=float(box[first]) * scale)).clamp(min=0))
        return torch.einsum("...hw,h,w->...", maps, *covered) / maps.sum((-2, -1))


@dataclass(frozen=True)
class Run:
    """A detector's detections in a picture, and the recorded calls of its modules."""

    picture: Picture
    frame: Frame
    detections: Detections
    calls: list[Call]

    def call_of(self, module: nn.Module) -> Call:
        """Find the last call of a module; raises ValueError if there was none."""
        for call in reversed(self.calls):
            if call.module is module:
                return call
        raise ValueError("it was not called")


def run(detector: Detector, picture: Picture, modules: Iterable[nn.Module]) -> Run:
    """Run a detector, with gradients, and record the calls of some of its modules.

    Args:
        detector: runs on the picture.
        picture: comes from :meth:`Detector.read`.
        modules: to record besides the detector's backbone and region extractors.
    """
    backbone = detector.model.get_submodule("backbone")
    recorded = [backbone, *detector.region_extractors(), *modules]
    with record_calls(recorded) as calls, torch.enable_grad():
        pixels = picture.pixels.clone().requires_grad_()  # the parameters need no gradient
        detections = detector.detect(picture, pixels)
    height, width = picture.image.shape[:2]
    padded = next(call for call in calls if call.module is backbone).args[0].shape
    frame = Frame((height, width), picture.input_size, (padded[2], padded[3]))
    return Run(picture, frame, detections, calls)


def region_attention(
    detector: Detector, run: Run, classifier: IDAClassifier, detection: int
) -> tuple[Tensor, Tensor]:
    """Compute IDA's attention for a detection's class, in the region that the detection came from.

    Args:
        detector: made the detection.
        run: recorded the calls of ``classifier``.
        classifier: classifies the regions; in a cascade, the last stage's.
        detection: index of the detection.

    Returns:
        The spatial attention of each head (N, h, w), and the region's box in pixels of the input.

    Raises:
        ValueError: if the classifier works on no regions, or the score depends on none of them.
    """
    call = run.call_of(classifier)
    before = run.calls[: run.calls.index(call)]
    extractors = detector.region_extractors()
    regions = [c for c in before if c.module in extractors]
    if not regions:
        raise ValueError("it classifies no regions")
    # A score depends on the logits of the region that it belongs to, and on no other region's.
    index = int(_gradient_of_score(run, detection, call.output).abs().sum(1).argmax())
    maps = spatial_attention(classifier, call.args[0][index : index + 1])
    return maps[:, run.detections.classes[detection]], detector.regions(regions[-1])[index]


@torch.no_grad()
def spatial_attention(classifier: IDAClassifier, x: Tensor) -> Tensor:
    """Compute where each head attends in x (1, C, H, W) for each class: (N, K, H, W)."""
    _, attention = classifier(x, return_attention=True)
    return attention[0]


def check_depends_on(run: Run, layer: nn.Module, detection: int) -> None:
    """Check that a layer puts out one feature map that a detection's score depends on.

    Raises:
        ValueError: if it puts out anything else, or the score has no gradient there.
    """
    outputs = [call.output for call in run.calls if call.module is layer]
    if len(outputs) != 1:
        raise ValueError(f"it is called {len(outputs)} times for an image, expected once")
    output = outputs[0]
    if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"it puts out {shape}, expected a feature map of shape (1, C, H, W)")
    _gradient_of_score(run, detection, output)


def _gradient_of_score(run: Run, detection: int, x: Tensor) -> Tensor:
    """Differentiate a detection's score with respect to x; raises ValueError if that gives 0."""
    score = run.detections.scores[detection]
    gradient = None
    if score.requires_grad and x.requires_grad:
        (gradient,) = torch.autograd.grad(score, x, retain_graph=True, allow_unused=True)
    if gradient is None or not gradient.any():
        raise ValueError(
            f"the score {score.item():.3g} has no gradient there: it is saturated, does not depend "
            "on it, or this kind of detector cuts gradients off"
        )
    return gradient


def load_weights(model: nn.Module, path: str, *, trust: bool = False) -> Mapping[str, Any]:
    """Load a whole detector's checkpoint, which must hold every tensor of the model.

    Tensors that the model has no place for are logged.

    Args:
        model: gets the tensors.
        path: path of the checkpoint.
        trust: let the file run what it asks to run.

    Returns:
        The content of the checkpoint.

    Raises:
        ValueError: if the file cannot be read, or a tensor of the model is missing or of another
            shape in it.
    """
    content = read_checkpoint(path, trust=trust)
    state = OrderedDict(find_state_dict(content))
    # Modules read the age of a file's names from its metadata.
    saved = content.get("state_dict", content.get("model", content))
    setattr(state, "_metadata", getattr(saved, "_metadata", None))  # noqa: B010  # mypy
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()]
        first = next((line for line in reasons if "size mismatch" in line), reasons[0])
        raise ValueError(f"{path!r} does not fit the config: {first}") from error
    missing = _needed(missing)
    if missing:
        raise ValueError(
            f"{path!r} lacks {_some(missing)}, which would stay random; expected the checkpoint of "
            "a detector trained with this config"
        )
    unexpected = _needed(unexpected)
    if unexpected:
        logger.warning(f"{path!r} has {_some(unexpected)} that the config has no place for")
    return content


def _needed(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _OPTIONAL & set(name.split("."))]


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"


def _resize(maps: Tensor, size: Size) -> Tensor:
    flat = maps.detach().float().cpu().reshape(1, -1, *maps.shape[-2:])
    resized = F.interpolate(flat, size, mode="bilinear", align_corners=False)
    return resized.reshape(*maps.shape[:-2], *size)
