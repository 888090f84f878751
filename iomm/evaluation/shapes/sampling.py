"""Scenes drawn from (seed, index), none of them ambiguous.

Every scene keeps its things apart, inside the rim, large enough and in colours that differ from the
background; where a prompt names a relation, the things stand so that only this one holds, with a margin. A
scene that breaks a rule is drawn again from the same stream, so scene `index` is a function of (seed, stream,
index).

The image stream shows more than the prompts ask for (mixed colours, groups of different things), and by
default the held-out combinations too: training on images alone may see anything, only pairs may not.
"""

import enum
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iomm.evaluation.shapes.lab import distance, to_lab
from iomm.evaluation.shapes.prompts import (
    CATEGORIES,
    HELDOUT_KINDS,
    Facts,
    Prompt,
    all_facts,
    is_heldout_relation,
    texts,
)
from iomm.evaluation.shapes.relations import Relation, offset_shares, relations, thing_box
from iomm.evaluation.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, reach

RADII = {1: (0.19, 0.33), 2: (0.16, 0.22), 3: (0.155, 0.18), 4: (0.155, 0.165)}  # by the number of things
RIM = 3.5 / 64  # of the side, free of things
GAP = 4.5 / 64  # between things
MIN_CONTRAST = 50.0  # of a thing with the background, in CIELAB
MIN_CLEAR = 0.8  # share of the distance that a named relation has; 0.5 would do for it to hold
BACKGROUND_SHARES = {"white": 0.5, "grey": 0.125, "sand": 0.125, "sky": 0.125, "mint": 0.125}
_COUNTED_SHARE = 0.3  # of the unlabeled images: two to four of one kind; the others: one to four of any
_LAYOUTS = 64  # tried at once
_TRIES = 2000
Kind = tuple[str, str]  # shape, colour


class Stream(enum.IntEnum):
    """One independent sequence of scenes for each use; part of what a seed means: never renumber."""

    IMAGES = 1
    PAIRS = 2
    HELDOUT = 3
    EDITS = 4


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A scene and a caption that is true of it."""

    scene: Scene
    prompt: Prompt


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The random stream of one scene: Philox4x64 keyed by (seed, stream), counting from `index`."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]))


def draw_image(seed: int, index: int, *, show_heldout: bool = True) -> Scene:
    """Scene `index` of the unlimited stream of unlabeled images.

    Args:
        show_heldout: False: without the combinations that pairs do not show.
    """
    rng = generator(seed, Stream.IMAGES, index)
    for _ in range(_TRIES):
        counted = rng.uniform() < _COUNTED_SHARE
        kinds = _kinds(rng, choose(rng, all_facts("counting"))) if counted else _any_kinds(rng)
        scene = scene_with(kinds, rng)
        if show_heldout or not shows_heldout(scene):
            return scene
    raise AssertionError(f"no scene without held-out combinations in {_TRIES} draws")


def draw_pair(seed: int, index: int, *, stream: Stream = Stream.PAIRS) -> Pair:
    """Pair `index`: category index mod 6, and nothing in its scene that is held out."""
    rng = generator(seed, stream, index)
    facts = choose(rng, all_facts(CATEGORIES[index % len(CATEGORIES)]))
    prompt = Prompt(text=choose(rng, texts(facts)), facts=facts)
    for _ in range(_TRIES):
        scene = scene_of(facts, rng)
        if not shows_heldout(scene):
            return Pair(scene=scene, prompt=prompt)
    raise AssertionError(f"no scene of {prompt.text!r} without held-out combinations in {_TRIES} draws")


def scene_of(facts: Facts, rng: np.random.Generator) -> Scene:
    """A scene of which the facts are true, and which shows nothing else."""
    return scene_with(_kinds(rng, facts), rng, facts=facts)


def shows_heldout(scene: Scene) -> bool:
    """Whether a scene shows a combination that pairs may not."""
    if any((thing.shape, thing.colour) in HELDOUT_KINDS for thing in scene.things):
        return True
    return any(
        is_heldout_relation(a.shape, relation, b.shape)
        for a, b in itertools.permutations(scene.things, 2)
        for relation in relations(thing_box(a), thing_box(b))
    )


def choose[T](rng: np.random.Generator, among: tuple[T, ...] | list[T]) -> T:
    return among[int(rng.integers(len(among)))]


def _kinds(rng: np.random.Generator, facts: Facts) -> list[Kind]:
    """Shape and colour of each thing; those of one `Wanted` share theirs."""
    return [
        kind
        for wanted in facts.wanted
        for kind in [(wanted.shape, wanted.colour or choose(rng, tuple(COLOURS)))] * wanted.count
    ]


def _any_kinds(rng: np.random.Generator) -> list[Kind]:
    return [(choose(rng, SHAPES), choose(rng, tuple(COLOURS))) for _ in range(int(rng.integers(1, 5)))]


def scene_with(
    kinds: Sequence[Kind], rng: np.random.Generator, *, facts: Facts | None = None, room_for: int = 0
) -> Scene:
    """A scene of things of these kinds, one to four, somewhere.

    Args:
        facts: have to be true of it, in its relation too.
        room_for: how many things more are to find room later; all are as small as that asks for.
    """
    background = _background(rng, {colour for _, colour in kinds})
    for _ in range(_TRIES):
        things = _layout(rng, kinds, room_for)
        if things is None:
            continue
        if facts is None or facts.relation is None or stands_clearly(things[0], facts.relation, things[1]):
            return Scene(things=things, background=background)
    raise AssertionError(f"no layout of {kinds} in {_TRIES} draws")


def stands_clearly(first: Thing, relation: Relation, second: Thing) -> bool:
    """Whether this relation and no other holds of the first thing to the second, by a margin."""
    a, b = thing_box(first), thing_box(second)
    clearest = max(abs(share) for share in offset_shares(a, b))
    return relations(a, b) == {relation} and clearest >= MIN_CLEAR


@functools.cache
def contrast(colour: str, background: str) -> float:
    """Distance of a thing's colour from the background's, in CIELAB."""
    both = np.array([COLOURS[colour], BACKGROUNDS[background]], dtype=np.uint8)
    return float(distance(*to_lab(both)))


def _background(rng: np.random.Generator, colours: set[str]) -> str:
    fit = {
        background: share
        for background, share in BACKGROUND_SHARES.items()
        if all(contrast(colour, background) >= MIN_CONTRAST for colour in colours)
    }
    shares = np.array(list(fit.values()))
    return list(fit)[int(rng.choice(len(fit), p=shares / shares.sum()))]


def _layout(rng: np.random.Generator, kinds: Sequence[Kind], room_for: int) -> tuple[Thing, ...] | None:
    """Things of about one size, apart from each other and from the rim; None if they found no room."""
    low, high = RADII[len(kinds) + room_for]
    radius_N = rng.uniform(low, high) * rng.uniform(0.94, 1.0, len(kinds))
    reach_N = radius_N * [reach(shape) for shape, _ in kinds]
    free_N1 = (reach_N + RIM)[:, None]
    share_TN2 = rng.uniform(size=(_LAYOUTS, len(kinds), 2))
    centre_TN2 = free_N1 + (1 - 2 * free_N1) * share_TN2
    # The last try cannot fail: each thing in a quarter of its own.
    quarter_N2 = rng.permutation(np.array([(0, 0), (0, 1), (1, 0), (1, 1)]))[: len(kinds)]
    spare_N1 = np.maximum(0, (1 - GAP) / 2 - RIM - 2 * reach_N)[:, None]
    inner_N2 = free_N1 + spare_N1 * share_TN2[-1]
    centre_TN2[-1] = np.where(quarter_N2 == 0, inner_N2, 1 - inner_N2)
    apart_T = np.ones(_LAYOUTS, dtype=bool)
    for i, j in itertools.combinations(range(len(kinds)), 2):
        gap_T = np.hypot(*(centre_TN2[:, i] - centre_TN2[:, j]).T)
        apart_T &= gap_T >= reach_N[i] + reach_N[j] + GAP
    if not apart_T.any():
        return None
    centre_N2 = centre_TN2[apart_T.argmax()]
    return tuple(
        Thing(shape=shape, colour=colour, x=float(x), y=float(y), radius=float(radius))
        for (shape, colour), (x, y), radius in zip(kinds, centre_N2, radius_N, strict=True)
    )
