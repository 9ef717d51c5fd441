"""Unambiguous noun phrases for the objects of a scene, and captions made of them.

A phrase has a class and may have a size, a colour, a texture and a relation to another object:
"the large disk left of the square". The other object alone fits its own short name. A phrase means
all objects of the scene that fit it. A person's colour and texture are the shirt's: "the person in
a red striped shirt".

No random number is drawn. ``turn``, any number, chooses among phrases that are equally good,
so that images with different numbers show different kinds of phrases.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .captions import article, direction, ground, number, plural
from .scene import MAX_OBJECTS, Scene, Thing
from .vocabulary import PERSON_ID, THINGS

Span = tuple[int, int]
Item = TypeVar("Item")

MAX_CAPTION_WORDS = 40
# Even the longest plain phrase fits: "the small person in an orange checkered shirt" has 8 words.
_MAX_PHRASE_WORDS = MAX_CAPTION_WORDS // MAX_OBJECTS
_ATTRIBUTES = ("size", "color", "texture")
# Attributes to name: _FREE where the class alone tells an object apart, otherwise _NEEDED.
_FREE = ((), ("color",), ("size", "color"), ("color", "texture"), ("size",), _ATTRIBUTES)
_NEEDED = (
    ("color",),
    ("size",),
    ("texture",),
    ("size", "color"),
    ("size", "texture"),
    ("color", "texture"),
)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase in lower case, and the positions of its objects in ``scene.things``."""

    text: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class _Description:
    """Conditions of a phrase on an object; None is no condition."""

    category_id: int
    size: str | None = None
    color: str | None = None
    texture: str | None = None
    direction: str | None = None
    reference: int | None = None  # position of the object at the start of ``direction``

    def objects(self, scene: Scene) -> tuple[int, ...]:
        """List the positions of the objects that fit."""
        return tuple(
            position for position, thing in enumerate(scene.things) if self._fits(thing, scene)
        )

    def _fits(self, thing: Thing, scene: Scene) -> bool:
        asked = (
            (self.category_id, thing.category_id),
            (self.size, thing.size),
            (self.color, thing.color),
            (self.texture, thing.texture.kind),
        )
        if any(wanted not in (None, value) for wanted, value in asked):
            return False
        if self.reference is None:
            return True
        reference = scene.things[self.reference]
        return thing is not reference and direction(thing, reference) == self.direction

    def text(self, count: int, counted: bool = False) -> str:
        """Write the phrase for ``count`` objects; "two disks" if ``counted``, else "the disks"."""
        name = THINGS[self.category_id - 1].name
        look = [word for word in (self.color, self.texture) if word]
        if self.category_id == PERSON_ID:
            before, after = [self.size], _shirt(look, count)
        else:
            before, after = [self.size, *look], []
        start = number(count) if counted else "the"
        noun = name if count == 1 else plural(name)
        return " ".join([start, *(word for word in before if word), noun, *after])


def caption_phrases(scene: Scene, mentionable: Collection[int], turn: int) -> list[Phrase]:
    """Choose phrases that together mean each object at most once, in the order of the objects.

    Args:
        scene: scene of the phrases.
        mentionable: positions of the objects that may be meant. A phrase that also fits another
            object is not used.
        turn: chooses among equally good phrases.
    """
    phrases: list[Phrase] = []
    free = set(mentionable)
    for position in range(len(scene.things)):
        if position in free:
            phrase = next(_candidates(scene, position, free, turn + position), None)
            if phrase is not None:
                phrases.append(phrase)
                free.difference_update(phrase.objects)
    return phrases


def expressions(scene: Scene, mentionable: Collection[int], turn: int) -> list[Phrase]:
    """Choose phrases for one object each: one by its attributes and, if any, one by a relation.

    Args:
        scene: scene of the phrases.
        mentionable: positions of the objects that may be meant.
        turn: chooses among equally good phrases.
    """
    phrases = []
    for position in range(len(scene.things)):
        if position in mentionable:
            for kind in (_by_attributes, _by_relation):
                found = kind(scene, position, turn + position)
                phrase = next((item for item in found if item.objects == (position,)), None)
                if phrase is not None:
                    phrases.append(phrase)
    return phrases


def caption(scene: Scene, phrases: list[Phrase]) -> tuple[str, list[Span]]:
    """Write a caption in lower case, and the span of each phrase: ``caption[begin:end] == text``.

    Without any phrase it names only the ground.
    """
    text, spans = "", []
    for phrase in phrases:
        text += ", " if text else ""
        spans.append((len(text), len(text) + len(phrase.text)))
        text += phrase.text
    return f"{text or ground(scene)}.", spans


def _candidates(scene: Scene, position: int, free: set[int], turn: int) -> Iterator[Phrase]:
    """List phrases that mean an object, alone or with others of ``free``, the best first."""
    kinds = [_by_attributes, _by_relation, _of_several]
    if _is_alone(scene, _described(scene, position, ())):
        kinds = [_by_attributes, _by_attributes, _by_relation]
    found = [phrase for kind in _rotated(kinds, turn) for phrase in kind(scene, position, turn)]
    found.append(_phrase(scene, _described(scene, position, _ATTRIBUTES)))
    return (phrase for phrase in found if free.issuperset(phrase.objects))


def _by_attributes(scene: Scene, position: int, turn: int) -> Iterator[Phrase]:
    """List phrases without a relation that mean one object."""
    ways = _FREE if _is_alone(scene, _described(scene, position, ())) else _NEEDED
    for attributes in (*_rotated(ways, turn // 3), _ATTRIBUTES):
        description = _described(scene, position, attributes)
        if _is_alone(scene, description):
            yield _phrase(scene, description)


def _by_relation(scene: Scene, position: int, turn: int) -> Iterator[Phrase]:
    """List phrases with a relation that mean one object, with few attributes first."""
    others = [other for other in range(len(scene.things)) if other != position]
    for attributes in ((), *_rotated(_NEEDED, turn // 3)):
        for other in _rotated(others, turn):
            side = direction(scene.things[position], scene.things[other])
            own = _described(scene, position, attributes)
            description = replace(own, direction=side, reference=other)
            if _short_name(scene, other) is None or not _is_alone(scene, description):
                continue
            phrase = _phrase(scene, description)
            if len(phrase.text.split()) <= _MAX_PHRASE_WORDS:
                yield phrase


def _of_several(scene: Scene, position: int, turn: int) -> Iterator[Phrase]:
    """List phrases that mean an object and others of its class, the largest groups first."""
    for attributes in ((), *_rotated(_NEEDED, turn // 3)):
        description = _described(scene, position, attributes)
        objects = description.objects(scene)
        if len(objects) > 1:
            yield Phrase(description.text(len(objects), counted=turn // 3 % 2 == 0), objects)


def _phrase(scene: Scene, description: _Description) -> Phrase:
    objects = description.objects(scene)
    text = description.text(len(objects))
    if description.reference is not None:
        text += f" {description.direction} {_short_name(scene, description.reference)}"
    return Phrase(text, objects)


def _short_name(scene: Scene, position: int) -> str | None:
    """Find the shortest phrase without a relation that means one object alone, or None."""
    ways = (_described(scene, position, names) for names in ((), *_NEEDED, _ATTRIBUTES))
    return next((way.text(1) for way in ways if _is_alone(scene, way)), None)


def _described(scene: Scene, position: int, attributes: tuple[str, ...]) -> _Description:
    """Describe an object by its class and some attributes, but never as plain."""
    thing = scene.things[position]
    texture = None if thing.texture.kind == "plain" else thing.texture.kind
    return _Description(
        thing.category_id,
        thing.size if "size" in attributes else None,
        thing.color if "color" in attributes else None,
        texture if "texture" in attributes else None,
    )


def _is_alone(scene: Scene, description: _Description) -> bool:
    return len(description.objects(scene)) == 1


def _shirt(look: list[str], count: int) -> list[str]:
    """Write the words after "person" or "people"."""
    if not look:
        return []
    return ["in", article(look[0]), *look, "shirt"] if count == 1 else ["in", *look, "shirts"]


def _rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Rotate the items, so that number ``turn`` comes first."""
    start = turn % max(len(items), 1)
    return [*items[start:], *items[:start]]
