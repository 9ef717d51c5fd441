"""Names and numbers that every file shares: classes, colours, keypoints, companions."""

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Category:
    """One class as COCO describes it; ``color`` is the base colour in panoptic drawings, 0…255."""

    id: int
    name: str
    supercategory: str
    color: RGB


# Person is category 1, as in COCO. The order is also the order of --classes (the first N
# are used) and of --imbalance (the first is the most frequent).
THINGS = (
    Category(1, "person", "person", (220, 20, 60)),
    Category(2, "disk", "shape", (0, 0, 142)),
    Category(3, "square", "shape", (0, 226, 252)),
    Category(4, "triangle", "shape", (106, 0, 228)),
    Category(5, "star", "shape", (250, 170, 30)),
    Category(6, "ring", "shape", (165, 42, 42)),
    Category(7, "cross", "shape", (0, 82, 0)),
)

# The ids do not depend on --classes. So a stuff class has the same id in every dataset.
STUFF = (
    Category(8, "grass", "ground", (152, 251, 152)),
    Category(9, "sand", "ground", (210, 170, 100)),
    Category(10, "water", "water", (58, 41, 149)),
    Category(11, "brick", "wall", (179, 0, 194)),
    Category(12, "stone", "ground", (130, 114, 135)),
    Category(13, "sky", "sky", (70, 130, 180)),
)

PERSON_ID = 1
SKY_ID = 13

# Muted, so that the saturated objects stay recognisable on every ground.
STUFF_COLORS: dict[int, RGB] = {
    8: (112, 140, 84),
    9: (200, 182, 140),
    10: (92, 130, 158),
    11: (150, 104, 88),
    12: (138, 138, 136),
    13: (166, 194, 218),
}

OBJECT_COLORS: dict[str, RGB] = {
    "red": (210, 38, 38),
    "orange": (240, 130, 25),
    "yellow": (245, 215, 45),
    "green": (20, 150, 60),
    "cyan": (40, 215, 215),
    "blue": (35, 70, 210),
    "purple": (125, 45, 170),
    "pink": (245, 125, 185),
    "white": (245, 245, 245),
    "black": (32, 32, 38),
}

# Of --class-colors. Each stands out from every ground.
CLASS_COLORS = {
    1: "red",
    2: "blue",
    3: "yellow",
    4: "green",
    5: "black",
    6: "cyan",
    7: "orange",
}
PEBBLE_COLOR = "purple"  # which is no class's

TEXTURES = ("plain", "striped", "dotted", "shaded", "checkered")

KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)

# COCO's own list; the numbers count keypoints from 1.
SKELETON = (
    (16, 14),
    (14, 12),
    (17, 15),
    (15, 13),
    (12, 13),
    (6, 12),
    (7, 13),
    (6, 7),
    (6, 8),
    (7, 9),
    (8, 10),
    (9, 11),
    (2, 3),
    (1, 2),
    (1, 3),
    (2, 4),
    (3, 5),
    (4, 6),
    (5, 7),
)


def companion_groups(classes: int) -> tuple[tuple[int, ...], ...]:
    """Split category ids 1…``classes`` into pairs; an odd count ends with a group of three."""
    starts = range(1, classes - classes % 2, 2)
    groups = [(first, first + 1) for first in starts]
    if classes % 2:
        return (*groups[:-1], (classes - 2, classes - 1, classes))
    return tuple(groups)


def companions(classes: int) -> dict[int, int]:
    """Find each category's companion, by category id: the next in its group, cyclically.

    With 7 classes: person ↔ disk, square ↔ triangle, star → ring → cross → star.
    """
    return {
        member: group[(position + 1) % len(group)]
        for group in companion_groups(classes)
        for position, member in enumerate(group)
    }
