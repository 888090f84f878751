"""GenEval's verdict on one picture, from what a detector found in it.

- A thing that is asked for has to be there often enough; the surest ones are looked at, in order.
- Its colour has to be the asked one on as many as were asked for.
- Its position is that of its box's centre against the other's, less a tenth of both boxes' sizes. It is left
  of the other if more than half of the distance of the centres remains; so for right of, above and below.
- A thing that is excluded may not be there as often as the clause says.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of the detector's score
MAX_OBJECTS = 16  # of a class
POSITION_SHARE = 0.1  # of the boxes' sizes that counts as no offset

Box = tuple[float, float, float, float]  # left, top, right, bottom, px


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One detected object."""

    box: Box
    score: float
    mask_HW: np.ndarray  # bool, of the picture's size


Things = Mapping[str, Sequence[Thing]]  # by class, surest first
ColorsOf = Callable[[Sequence[Thing], str], list[str]]  # of a class's things, one each


def kept(found: Mapping[str, Sequence[Thing]], tag: str) -> dict[str, list[Thing]]:
    """Things that are sure enough for a task, surest first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    sure = {
        name: sorted((thing for thing in things if thing.score > least), key=lambda t: -t.score)[:MAX_OBJECTS]
        for name, things in found.items()
    }
    return {name: things for name, things in sure.items() if things}


def verdict(things: Things, metadata: Mapping[str, Any], colors_of: ColorsOf) -> tuple[bool, str]:
    """Whether a picture is right, and if not, why."""
    reasons: list[str] = []
    groups: list[Sequence[Thing] | None] = []
    for clause in metadata.get("include", ()):
        problem, found = _included(things, clause, groups, colors_of)
        groups.append(None if problem else found)
        reasons += [problem] if problem else []
    for clause in metadata.get("exclude", ()):
        name, count = clause["class"], len(things.get(clause["class"], ()))
        if count >= clause["count"]:
            reasons.append(f"expected {name}<{clause['count']}, found {count}")
    return not reasons, "\n".join(reasons)


def relations(a: Box, b: Box) -> set[str]:
    """Where box a stands from box b."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    spare = [POSITION_SHARE * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    revised = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, spare, strict=True)]
    if max(abs(r) for r in revised) < 1e-3:
        return set()
    x, y = (r / math.hypot(*offset) for r in revised)
    said = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in said.items() if true}


def _included(
    things: Things, clause: Mapping[str, Any], groups: Sequence[Sequence[Thing] | None], colors_of: ColorsOf
) -> tuple[str, Sequence[Thing]]:
    """What is wrong with a clause (nothing: ""), and the things that it is about."""
    name, count = clause["class"], clause["count"]
    found = things.get(name, ())[:count]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}", found
    if "color" in clause:
        colors = colors_of(found, name)
        right = colors.count(clause["color"])
        if right < count:
            others = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
            color = clause["color"]
            return f"expected {color} {name}>={count}, found {right} {color}; and {others}", found
    if "position" in clause:
        wanted, group = clause["position"]
        target = groups[group]
        if target is None:
            return f"no target for {name} to be {wanted}", found
        for thing in found:
            for other in target:
                stands = relations(thing.box, other.box)
                if wanted not in stands:
                    where = " and ".join(sorted(stands))
                    return f"expected {name} {wanted} target, found {where} target", found
    return "", found
