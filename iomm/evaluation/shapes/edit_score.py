"""Whether a picture is what an edit makes of its source, exactly.

Reached: everything that was asked for is there, what was to go is gone, and nothing came besides. Kept:
what the instruction does not name is as it was, in shape, colour, size, place and background. An edit is
correct if it is reached and kept; a picture that ignores the instruction is kept, not reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iomm.evaluation.bootstrap import Interval, interval_of_means
from iomm.evaluation.shapes.detector import RIM_DISTANCE, Detection, Found, detect
from iomm.evaluation.shapes.edits import ACTIONS, Action, EditCase, Expected, expect
from iomm.evaluation.shapes.lab import distance, to_lab
from iomm.evaluation.shapes.relations import relations, thing_box
from iomm.evaluation.shapes.scene import BACKGROUNDS, Thing

PLACE_TOLERANCE = 0.05  # of the side, that a thing left alone may have moved
SIZE_TOLERANCE = 0.2  # of its radius


@dataclass(frozen=True, kw_only=True)
class EditVerdict:
    """What became of one edit."""

    reached: bool
    kept: bool
    reason: str  # why it is not correct; empty if it is
    detection: Detection

    @property
    def correct(self) -> bool:
        return self.reached and self.kept


@dataclass(frozen=True, kw_only=True)
class EditScore:
    """Shares of edits. `overall`, `reached` and `kept` are means over the actions."""

    overall: Interval
    reached: Interval
    kept: Interval
    actions: dict[Action, Interval]
    verdicts: tuple[EditVerdict, ...]


def judge_edit(expected: Expected, detection: Detection) -> EditVerdict:
    """Compare what was found in a picture with what an edit was to make of its source."""
    left = [found for found in detection.objects if found not in detection.unclear]
    missed, changed = _unlike_background(expected, detection), _other_number(expected, left)
    unclear = [f"unclear: {found.reason}" for found in detection.unclear]
    gone = [thing for thing in expected.kept if not _take(left, thing)]
    if len(gone) > expected.spare:
        missed += [f"{_name(thing)} is not as it was" for thing in gone]
    elif len(gone) < expected.spare:
        changed.append(f"{expected.spare} were to go, {len(gone)} are gone")
    changed += [f"expected {_name(thing)} in place" for thing in expected.changed if not _take(left, thing)]
    for kind in expected.new:
        found = next((one for one in left if (one.shape, one.colour) == kind), None)
        if found is None:
            changed.append(f"expected another {kind[1]} {kind[0]}")
            continue
        left.remove(found)
        if expected.relation is not None:
            relation, goal = expected.relation
            if relation not in relations(found.box, thing_box(goal)):
                changed.append(f"expected it {relation} {_name(goal)}")
        if expected.size is not None and abs(found.radius / expected.size - 1) > SIZE_TOLERANCE:
            missed.append(f"{kind[1]} {kind[0]} has another size")
    changed += [f"{found.colour} {found.shape} was not asked for" for found in left] + unclear
    if detection.reason is not None:
        changed.append(detection.reason)
    reason = "; ".join(changed + missed)
    return EditVerdict(reached=not changed, kept=not missed, reason=reason, detection=detection)


def _unlike_background(expected: Expected, detection: Detection) -> list[str]:
    if detection.background is None:
        return []
    both = to_lab(np.array([detection.background, BACKGROUNDS[expected.background]], dtype=np.uint8))
    return [] if distance(*both) < RIM_DISTANCE else ["the background is another"]


def _other_number(expected: Expected, found: list[Found]) -> list[str]:
    if expected.count is None:
        return []
    kind, wanted = expected.count
    there = sum((one.shape, one.colour) == kind for one in found)
    said = f"{wanted} of {kind[1]} {kind[0]} were asked for, there are {there}"
    return [] if there == wanted else [said]


def _take(left: list[Found], thing: Thing) -> bool:
    """Take what shows a thing out of what is left; whether there was any."""
    for found in left:
        same_kind = (found.shape, found.colour) == (thing.shape, thing.colour)
        near = np.hypot(found.x - thing.x, found.y - thing.y) <= PLACE_TOLERANCE
        if same_kind and near and abs(found.radius / thing.radius - 1) <= SIZE_TOLERANCE:
            left.remove(found)
            return True
    return False


def _name(thing: Thing) -> str:
    return f"the {thing.colour} {thing.shape}"


def score_edits(images_NHW3: np.ndarray, cases: Sequence[EditCase], *, seed: int = 0) -> EditScore:
    """Judge one edited picture (uint8 RGB) of each case.

    Raises:
        ValueError: pictures and cases do not go together, or there are none.
    """
    if not cases or len(images_NHW3) != len(cases):
        raise ValueError(
            f"{len(images_NHW3)} pictures of {len(cases)} edits; give one picture of each, and at least one."
        )
    verdicts = tuple(
        judge_edit(expect(case.source, case.edit), detect(image_HW3))
        for case, image_HW3 in zip(cases, images_NHW3, strict=True)
    )
    numbers: dict[Action, list[int]] = {
        action: [n for n, c in enumerate(cases) if c.edit.action == action] for action in ACTIONS
    }
    asked: dict[Action, list[int]] = {action: of for action, of in numbers.items() if of}

    def mean(what: str, actions: Sequence[Action]) -> Interval:
        value_N = np.array([getattr(verdict, what) for verdict in verdicts], dtype=float)
        return interval_of_means([value_N[asked[action]] for action in actions], seed=seed)

    everything = tuple(asked)
    actions: dict[Action, Interval] = {action: mean("correct", [action]) for action in everything}
    return EditScore(
        overall=mean("correct", everything),
        reached=mean("reached", everything),
        kept=mean("kept", everything),
        actions=actions,
        verdicts=verdicts,
    )
