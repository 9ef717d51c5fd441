"""The person class: a posed figure with COCO's 17 keypoints, and the parts that draw it.

The figure is built at a height of about 1 around COCO's keypoints. Every part is the convex hull
of a few circles centred on keypoints. So a keypoint always lies well inside its part.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .shapes import Part, Points, circle, normalisation
from .vocabulary import KEYPOINTS

_INDEX = {name: index for index, name in enumerate(KEYPOINTS)}
_FACE = ("nose", "left_eye", "right_eye")

# (outward angle of the upper arm, bend of the elbow) in degrees, as (low, high) ranges.
_ARMS = (
    ((8, 35), (-5, 30)),  # hanging
    ((50, 105), (-25, 25)),  # held out
    ((110, 160), (-10, 35)),  # raised
    ((25, 60), (70, 120)),  # waving
    ((35, 55), (-115, -85)),  # hand on the hip
)
# (outward angle of the thigh, bend of the knee)
_LEGS = (((2, 10), (-4, 4)), ((14, 28), (-20, 0)), ((28, 48), (-55, -20)))


@dataclass(frozen=True, eq=False)
class Pose:
    """A unit figure.

    Attributes:
        keypoints: (17, 2) in COCO's order, unit outline coordinates.
        visibility: (17,) by the pose alone: 2 seen, 1 behind the head, 0 not labelled.
        scale: factor from figure coordinates (height about 1) to unit outline coordinates.
        back: whether the figure is seen from behind.
    """

    keypoints: Points
    visibility: NDArray[np.int64]
    scale: float
    back: bool


def sample_pose(rng: np.random.Generator) -> Pose:
    """Draw a pose: arms, legs, turn of the head, lean; one in five figures is seen from behind."""
    back = bool(rng.random() < 0.2)
    # A figure that faces the viewer has its left side on the right of the image.
    left = -1 if back else 1
    keypoints = np.zeros((17, 2))
    visibility = np.full(17, 2)
    yaw = rng.uniform(-1, 1)
    keypoints[:5] = _head_points(yaw, left)
    for side, sign in (("left", left), ("right", -left)):
        for names, points in (
            (("shoulder", "elbow", "wrist"), _arm(rng, sign)),
            (("hip", "knee", "ankle"), _leg(rng, sign)),
        ):
            for name, point in zip(names, points, strict=True):
                keypoints[_INDEX[f"{side}_{name}"]] = point
    if back:
        visibility[[_INDEX[name] for name in _FACE]] = 0
    elif abs(yaw) > 0.6:
        # The ear that the head turns towards disappears behind the face.
        hidden = "left_ear" if yaw * left > 0 else "right_ear"
        visibility[_INDEX[hidden]] = 1
    lean = np.deg2rad(rng.uniform(-12, 12))
    cos, sin = np.cos(lean), np.sin(lean)
    keypoints = keypoints @ np.array([[cos, sin], [-sin, cos]])
    raw = Pose(keypoints, visibility, 1.0, back)
    scale, shift = normalisation(figure_outline(raw))
    return Pose(keypoints * scale + np.asarray(shift), visibility, scale, back)


def figure_outline(pose: Pose) -> list[Part]:
    """List the figure's parts from back to front, in the coordinates of ``pose.keypoints``."""
    points = {name: pose.keypoints[index] for name, index in _INDEX.items()}
    unit = pose.scale

    def hull(paint: str, *circles: tuple[str, float]) -> Part:
        rims = [circle(tuple(points[name]), radius * unit) for name, radius in circles]
        ring = cv2.convexHull(np.concatenate(rims).astype(np.float32))
        return Part((ring[:, 0].astype(np.float64),), paint)

    parts = []
    for side in ("left", "right"):
        hip, knee, ankle = (f"{side}_{name}" for name in ("hip", "knee", "ankle"))
        parts += [hull("trousers", (hip, 0.062), (knee, 0.05))]
        parts += [hull("trousers", (knee, 0.05), (ankle, 0.038)), hull("shoe", (ankle, 0.046))]
    shoulders, hips = ("left_shoulder", "right_shoulder"), ("left_hip", "right_hip")
    corners = [(name, 0.05) for name in shoulders] + [(name, 0.055) for name in hips]
    parts += [_neck(pose), hull("shirt", *corners)]
    for side in ("left", "right"):
        shoulder, elbow, wrist = (f"{side}_{name}" for name in ("shoulder", "elbow", "wrist"))
        parts += [hull("sleeve", (shoulder, 0.046), (elbow, 0.04))]
        parts += [hull("skin", (elbow, 0.036), (wrist, 0.036))]
    return parts + _head_parts(pose)


def _head_points(yaw: float, left: int) -> Points:
    """Place nose, eyes and ears, (5, 2); ``yaw`` -1…1 moves the face sideways."""
    x = 0.045 * yaw
    features = [(x, 0.015), (x + 0.042 * left, -0.02), (x - 0.042 * left, -0.02)]
    ears = [(0.108 * left, 0.0), (-0.108 * left, 0.0)]
    return np.add(features + ears, (0, -0.385), dtype=np.float64)


def _head_axes(pose: Pose) -> tuple[Points, Points]:
    """Find the head centre (2,) and the downward unit vector (2,) from the two ears."""
    first, second = pose.keypoints[3], pose.keypoints[4]
    across = (first - second) if first[0] > second[0] else (second - first)
    across = across / np.linalg.norm(across)
    return (first + second) / 2, np.array([-across[1], across[0]])


def _neck(pose: Pose) -> Part:
    center, down = _head_axes(pose)
    rims = [circle(tuple(center + down * t * pose.scale), 0.04 * pose.scale) for t in (0.06, 0.13)]
    ring = cv2.convexHull(np.concatenate(rims).astype(np.float32))
    return Part((ring[:, 0].astype(np.float64),), "skin")


def _head_parts(pose: Pose) -> list[Part]:
    center, down = _head_axes(pose)
    unit = pose.scale

    def disk(paint: str, at: Points, radius: float) -> Part:
        return Part((circle(tuple(at), radius * unit, 24),), paint)

    ears = [disk("skin", pose.keypoints[index], 0.03) for index in (3, 4)]
    hair = disk("hair", center - down * 0.008 * unit, 0.112)
    if pose.back:
        return [hair, *ears]
    face = disk("skin", center + down * 0.018 * unit, 0.094)
    eyes = [disk("eye", pose.keypoints[index], 0.017) for index in (1, 2)]
    nose = disk("nose", pose.keypoints[0], 0.016)
    return [*ears, hair, face, *eyes, nose]


def _arm(rng: np.random.Generator, sign: int) -> list[Points]:
    upper, bend = _ARMS[rng.integers(len(_ARMS))]
    return _limb(rng, sign, (0.118, -0.235), upper, bend, (0.16, 0.15))


def _leg(rng: np.random.Generator, sign: int) -> list[Points]:
    upper, bend = _LEGS[rng.integers(len(_LEGS))]
    return _limb(rng, sign, (0.066, 0.06), upper, bend, (0.2, 0.2))


def _limb(
    rng: np.random.Generator,
    sign: int,
    root: tuple[float, float],
    upper: tuple[float, float],
    bend: tuple[float, float],
    lengths: tuple[float, float],
) -> list[Points]:
    """Place three joints of a limb on the side ``sign``; angles in degrees from straight down."""
    first = np.deg2rad(rng.uniform(*upper))
    second = first + np.deg2rad(rng.uniform(*bend))
    start = np.array([sign * root[0], root[1]])
    middle = start + lengths[0] * np.array([sign * np.sin(first), np.cos(first)])
    end = middle + lengths[1] * np.array([sign * np.sin(second), np.cos(second)])
    return [start, middle, end]
