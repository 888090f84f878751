"""Where one thing stands from another, by GenEval's rule."""

import functools
import math
from typing import Literal

from iomm.evaluation.shapes.scene import OUTLINES, Thing

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
FractionBox = tuple[float, float, float, float]  # left, top, right, bottom

_THRESHOLD = 0.1  # of both boxes' sizes; GenEval's POSITION_THRESHOLD
_MIN_SHARE = 0.5  # of the distance


@functools.cache
def _outline_box(shape: str) -> FractionBox:
    (left, top), (right, bottom) = OUTLINES[shape].min(axis=0), OUTLINES[shape].max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def thing_box(thing: Thing) -> FractionBox:
    """The smallest box around a thing, in fractions of the side."""
    left, top, right, bottom = _outline_box(thing.shape)
    x, y, radius = thing.x, thing.y, thing.radius
    return x + left * radius, y + top * radius, x + right * radius, y + bottom * radius


def offset_shares(a: FractionBox, b: FractionBox) -> tuple[float, float]:
    """How far the first box's centre lies to the right of, and below, the second's, after a tenth of both
    boxes' sizes is taken off, as shares of the centres' distance: in [-1, 1]."""
    x, y = ((a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1))
    spare_x, spare_y = (_THRESHOLD * (a[k + 2] - a[k] + b[k + 2] - b[k]) for k in (0, 1))
    gap = max(math.hypot(x, y), 1e-9)
    return (
        math.copysign(max(abs(x) - spare_x, 0), x) / gap,
        math.copysign(max(abs(y) - spare_y, 0), y) / gap,
    )


def relations(a: FractionBox, b: FractionBox) -> set[Relation]:
    """The relations that hold of the first box to the second: none, one, or on a diagonal two."""
    x, y = offset_shares(a, b)
    holds: dict[Relation, bool] = {
        "left of": x < -_MIN_SHARE,
        "right of": x > _MIN_SHARE,
        "above": y < -_MIN_SHARE,
        "below": y > _MIN_SHARE,
    }
    return {relation for relation, held in holds.items() if held}
