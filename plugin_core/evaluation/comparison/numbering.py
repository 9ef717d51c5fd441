"""The order of images and classes by their ids, as COCO's evaluation takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def sorted_ids(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Ids in the order in which COCO's evaluation takes them; texts come after numbers."""
    return sorted((record["id"] for record in records), key=lambda i: (isinstance(i, str), i))


def class_names(content: Mapping[str, Any]) -> list[str]:
    """Names of the classes in the order of their ids; the id is added to a name given twice."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    uses = Counter(names.values())
    return [
        names[i] if uses[names[i]] == 1 else f"{names[i]} ({i})"
        for i in sorted_ids(content["categories"])
    ]
