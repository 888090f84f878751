"""Edits of shapes scenes: instructions, and what they make of a scene.

    recolour   change the red star to blue             make the red star blue
    add        add a blue circle
    remove     remove the red star
    move       move the red star to the left of the blue circle     (right of, above, below)
    count      change the number of red stars to three

A text names its things by colour and shape, so it fits a scene only if it shows the named thing once (for
count: nothing else). `expect` says what has to be true afterwards, `apply` draws one scene of which it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from iomm.evaluation.shapes.prompts import NUMBERS, article, plural
from iomm.evaluation.shapes.relations import Relation, offset_shares, thing_box
from iomm.evaluation.shapes.sampling import (
    GAP,
    MIN_CONTRAST,
    RIM,
    Kind,
    Stream,
    choose,
    contrast,
    generator,
    scene_with,
    stands_clearly,
)
from iomm.evaluation.shapes.scene import COLOURS, SHAPES, Scene, Thing, reach

Action = Literal["recolour", "add", "remove", "move", "count"]
ACTIONS: tuple[Action, ...] = ("recolour", "add", "remove", "move", "count")
_COUNTS = {1: "one", **NUMBERS}
_PLACES: dict[Relation, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
_WORDINGS: tuple[tuple[Action, str], ...] = (
    ("recolour", "change the {subject} to {colour}"),
    ("recolour", "make the {subject} {colour}"),
    ("add", "add {a_subject}"),
    ("remove", "remove the {subject}"),
    ("move", "move the {subject} {place} the {other}"),
    ("count", "change the number of {subjects} to {count}"),
)
_MAX_ALREADY = 0.25  # share of the distance that a thing may have in the direction it is to be moved
_TRIES = 1000
_SPOTS = 512  # looked at for a new thing


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One instruction, as data. A kind is (shape, colour)."""

    action: Action
    subject: Kind
    colour: str | None = None  # recolour: the new one
    relation: Relation | None = None  # move: where the subject is to stand
    other: Kind | None = None  # move: from this thing
    count: int | None = None  # count: how many there are to be

    def texts(self) -> list[str]:
        """All wordings of the instruction."""
        fields = {
            "subject": _words(self.subject),
            "a_subject": article(_words(self.subject)),
            "subjects": plural(_words(self.subject)),
            "colour": self.colour,
            "place": None if self.relation is None else _PLACES[self.relation],
            "other": None if self.other is None else _words(self.other),
            "count": None if self.count is None else _COUNTS[self.count],
        }
        return [wording.format(**fields) for action, wording in _WORDINGS if action == self.action]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What has to be true of a picture after an edit."""

    background: str
    kept: tuple[Thing, ...]  # as they were
    spare: int = 0  # exactly as many of them are gone
    count: tuple[Kind, int] | None = None  # things of a kind that there are to be, wherever
    changed: tuple[Thing, ...] = ()  # in place, as they are now
    new: tuple[Kind, ...] = ()  # anywhere
    size: float | None = None  # radius of what is new; None: any
    relation: tuple[Relation, Thing] | None = None  # of what is new


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """One task of the edit benchmark, with one scene that solves it."""

    source: Scene
    edit: Edit
    text: str
    target: Scene


def _words(kind: Kind) -> str:
    shape, colour = kind
    return f"{colour} {shape}"


def _pattern(wording: str) -> re.Pattern[str]:
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    fields = {
        "subject": f"(?P<subject>(?:{colour}) (?:{shape}))",
        "a_subject": f"an? (?P<subject>(?:{colour}) (?:{shape}))",
        "subjects": f"(?P<subject>(?:{colour}) (?:{shape}))(?:es|s)",
        "colour": f"(?P<colour>{colour})",
        "place": f"(?P<place>{'|'.join(_PLACES.values())})",
        "other": f"(?P<other>(?:{colour}) (?:{shape}))",
        "count": f"(?P<count>{'|'.join(_COUNTS.values())})",
    }
    return re.compile(wording.format(**fields))


_PATTERNS: list[tuple[Action, re.Pattern[str]]] = [
    (action, _pattern(wording)) for action, wording in _WORDINGS
]


def parse(text: str) -> Edit:
    """The edit that an instruction's text says.

    Raises:
        ValueError: it is none of the known wordings.
    """
    for action, pattern in _PATTERNS:
        found = pattern.fullmatch(text)
        if found is None:
            continue
        said = found.groupdict()
        place, count, other = said.get("place"), said.get("count"), said.get("other")
        return Edit(
            action=action,
            subject=_kind(said["subject"]),
            colour=said.get("colour"),
            relation=next((relation for relation, words in _PLACES.items() if words == place), None),
            other=None if other is None else _kind(other),
            count=next((n for n, word in _COUNTS.items() if word == count), None),
        )
    examples = "; ".join(wording for _, wording in _WORDINGS)
    raise ValueError(f"the instruction {text!r} is none that a scene can follow. Known are: {examples}.")


def _kind(words: str) -> Kind:
    colour, shape = words.split()
    return shape, colour


def expect(scene: Scene, edit: Edit) -> Expected:
    """What an edit makes of a scene.

    Raises:
        ValueError: the scene does not show the named things as the instruction takes them.
    """
    others = tuple(thing for thing in scene.things if (thing.shape, thing.colour) != edit.subject)
    named = len(scene.things) - len(others)
    if edit.action == "add":
        return Expected(background=scene.background, kept=scene.things, new=(edit.subject,))
    if edit.action == "count":
        assert edit.count is not None
        if others or not named:
            raise ValueError(_misfit(scene, edit, f"show {plural(_words(edit.subject))} and nothing else"))
        return Expected(
            background=scene.background,
            kept=scene.things,
            spare=max(0, named - edit.count),
            new=(edit.subject,) * max(0, edit.count - named),
            count=(edit.subject, edit.count),
        )
    if named != 1:
        raise ValueError(_misfit(scene, edit, f"show one {_words(edit.subject)}"))
    (subject,) = (thing for thing in scene.things if (thing.shape, thing.colour) == edit.subject)
    if edit.action == "remove":
        return Expected(background=scene.background, kept=others)
    if edit.action == "recolour":
        assert edit.colour is not None
        changed = replace(subject, colour=edit.colour)
        return Expected(background=scene.background, kept=others, changed=(changed,))
    assert edit.relation is not None and edit.other is not None
    goals = [thing for thing in others if (thing.shape, thing.colour) == edit.other]
    if len(goals) != 1:
        raise ValueError(_misfit(scene, edit, f"show one {_words(edit.other)}"))
    return Expected(
        background=scene.background,
        kept=others,
        new=(edit.subject,),
        size=subject.radius,
        relation=(edit.relation, goals[0]),
    )


def _misfit(scene: Scene, edit: Edit, rule: str) -> str:
    shown = ", ".join(_words((thing.shape, thing.colour)) for thing in scene.things)
    return f"{edit.texts()[0]!r} does not fit a scene of {shown or 'nothing'}: it has to {rule}."


def apply(scene: Scene, edit: Edit, rng: np.random.Generator) -> Scene | None:
    """One scene that the edit makes of a scene; None if there is no room for what is new, or the new colour
    cannot be told from the background.

    Raises:
        ValueError: as `expect`.
    """
    expected = expect(scene, edit)
    things = [*expected.kept[: len(expected.kept) - expected.spare], *expected.changed]
    colours = [thing.colour for thing in expected.changed] + [colour for _, colour in expected.new]
    if any(contrast(colour, scene.background) < MIN_CONTRAST for colour in colours):
        return None
    radius = expected.size or min(thing.radius for thing in scene.things)
    for kind in expected.new:

        def fits(thing: Thing) -> bool:
            return expected.relation is None or stands_clearly(thing, *expected.relation)

        placed = _find_room(things, kind, radius, rng, fits)
        if placed is None:
            return None
        things.append(placed)
    return Scene(things=tuple(things), background=scene.background)


def _find_room(
    things: list[Thing], kind: Kind, radius: float, rng: np.random.Generator, fits: Callable[[Thing], bool]
) -> Thing | None:
    shape, colour = kind
    free = radius * reach(shape) + RIM
    spot_S2 = free + (1 - 2 * free) * rng.uniform(size=(_SPOTS, 2))
    apart_S = np.ones(_SPOTS, dtype=bool)
    for thing in things:
        gap = radius * reach(shape) + thing.radius * reach(thing.shape) + GAP
        apart_S &= np.hypot(*(spot_S2 - (thing.x, thing.y)).T) >= gap
    for x, y in spot_S2[apart_S].tolist():
        placed = Thing(shape=shape, colour=colour, x=x, y=y, radius=radius)
        if fits(placed):
            return placed
    return None


def draw_edit(seed: int, index: int) -> EditCase:
    """Task `index` of the edit benchmark: action index mod 5. A function of (seed, index)."""
    rng = generator(seed, Stream.EDITS, index)
    action = ACTIONS[index % len(ACTIONS)]
    for _ in range(_TRIES):
        source, edit = _draw_source(action, rng)
        target = apply(source, edit, rng)
        if target is not None:
            return EditCase(source=source, edit=edit, text=choose(rng, edit.texts()), target=target)
    raise AssertionError(f"no scene to {action} in {_TRIES} draws")


def _draw_source(action: Action, rng: np.random.Generator) -> tuple[Scene, Edit]:
    shapes, colours = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLOURS)).tolist()
    subject, *rest = zip(shapes, colours, strict=False)
    if action == "count":
        now, then = rng.permutation(list(_COUNTS))[:2].tolist()
        source = scene_with([subject] * now, rng, room_for=max(0, then - now))
        return source, Edit(action=action, subject=subject, count=then)
    shown = rest[: int(rng.integers(1, 3))]
    if action == "add":
        return scene_with(shown, rng, room_for=1), Edit(action=action, subject=subject)
    source = scene_with([subject, *shown], rng)
    if action == "move":
        x, y = offset_shares(*(thing_box(thing) for thing in source.things[:2]))
        shares: dict[Relation, float] = {"left of": -x, "right of": x, "above": -y, "below": y}
        elsewhere: list[Relation] = [one for one, share in shares.items() if share <= _MAX_ALREADY]
        relation = choose(rng, elsewhere)
        return source, Edit(action=action, subject=subject, relation=relation, other=shown[0])
    colour = choose(rng, colours[3:]) if action == "recolour" else None
    return source, Edit(action=action, subject=subject, colour=colour)
