"""Five plain sentences about a scene, as COCO has five captions an image."""

from collections import Counter

from .scene import Scene, Thing
from .vocabulary import PERSON_ID, STUFF, THINGS

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_STUFF_NAMES = {category.id: category.name for category in STUFF}


def captions(scene: Scene) -> list[str]:
    """Write five captions: the two largest objects, the counts, the largest, all, a front view."""
    by_size = sorted(scene.things, key=lambda thing: -thing.side)
    below = ground(scene)
    largest = _phrase(by_size[0])
    front = _phrase(scene.things[-1])
    sentences = [
        f"{_relation(by_size[0], by_size[1]) if len(by_size) > 1 else largest} on {below}",
        f"{_counts(scene)} on {below}",
        f"there is {largest} {_region(scene, by_size[0])} of the picture",
        f"a picture of {_join([_phrase(thing) for thing in scene.things])}",
        f"{front} in front of {below}",
    ]
    return [sentence[0].upper() + sentence[1:] + "." for sentence in sentences]


def _phrase(thing: Thing) -> str:
    """Describe an object by size, colour and texture: "a small red striped disk"."""
    texture = "" if thing.texture.kind == "plain" else f"{thing.texture.kind} "
    if thing.category_id == PERSON_ID:
        return f"a {thing.size} person in {article(thing.color)} {thing.color} {texture}shirt"
    return f"a {thing.size} {thing.color} {texture}{THINGS[thing.category_id - 1].name}"


def article(word: str) -> str:
    """Choose the indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


def direction(first: Thing, second: Thing) -> str:
    """Say where the first object is from the second: left of, right of, above or below."""
    dx, dy = (a - b for a, b in zip(first.center, second.center, strict=True))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _relation(first: Thing, second: Thing) -> str:
    return f"{_phrase(first)} {direction(first, second)} {_phrase(second)}"


def _counts(scene: Scene) -> str:
    counts = Counter(thing.category_id for thing in scene.things)
    return _join([_count(category_id, counts[category_id]) for category_id in sorted(counts)])


def _count(category_id: int, count: int) -> str:
    name = THINGS[category_id - 1].name
    return f"{number(count)} {name if count == 1 else plural(name)}"


def number(count: int) -> str:
    """Spell a number from 0 to 6."""
    return _NUMBERS[count]


def plural(name: str) -> str:
    """Name several objects of a class."""
    return {"person": "people", "cross": "crosses"}.get(name, f"{name}s")


def _join(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def ground(scene: Scene) -> str:
    """Name the background's one or two classes."""
    if len(scene.stuff) == 1:
        return _STUFF_NAMES[scene.stuff[0]]
    top, bottom = (_STUFF_NAMES[category_id] for category_id in scene.stuff)
    return f"{bottom} under {top}"


def _region(scene: Scene, thing: Thing) -> str:
    """Name the third of the picture, from left to right, that holds an object's centre."""
    thirds = ("on the left", "in the middle", "on the right")
    return thirds[min(int(3 * thing.center[0] / scene.aspect[0]), 2)]
