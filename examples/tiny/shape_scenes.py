"""Small scenes of coloured shapes with captions that say exactly what is drawn.

They teach the tiny MLLM what 1,700 emoji cannot: counts, colours, positions and relations. A scene is data
(`Scene`), the picture is a pure function of it (`draw_scene`), and the caption is another (`Scene.caption`).

Geometry is in fractions of the side, x to the right and y down, so one scene draws at any size.
Captions are split by hash (`is_heldout`): a held-out caption is never drawn for training, though its colours,
shapes and relations all occur there in other combinations.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from iomm.evaluation.shapes.scene import Thing

Relation = Literal["left of", "right of", "above", "below"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (221, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (248, 214, 40),
    "green": (45, 160, 70),
    "blue": (40, 90, 215),
    "purple": (130, 60, 175),
    "pink": (245, 140, 185),
    "brown": (125, 75, 40),
    "black": (25, 25, 25),
}
WHITE = (255, 255, 255)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
NUMBERS = {2: "two", 3: "three", 4: "four"}
CORNERS = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
RELATIONS: dict[Relation, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
HELDOUT_ONE_IN = 10
SUPERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn and what is said. `background` is a colour word, or None for white, which goes unsaid."""

    things: tuple[Thing, ...]
    sentence: str
    background: str | None = None

    @property
    def caption(self) -> str:
        """The full caption, such as `three green triangles on a blue background`."""
        return self.sentence + background_phrase(self.background)


def article(word: str) -> str:
    """`a` or `an`, as the word's first letter asks."""
    return "an" if word[0] in "aeiou" else "a"


def background_phrase(colour: str | None) -> str:
    """` on a blue background`, or nothing for the white background that is never mentioned."""
    return "" if colour is None else f" on {article(colour)} {colour} background"


def noun_phrase(colour: str, shape: str, count: int = 1) -> str:
    """`a red circle`, `three green crosses`. Raises ValueError for a count outside 1 to 4."""
    if count == 1:
        return f"{article(colour)} {colour} {shape}"
    if count not in NUMBERS:
        raise ValueError(
            f"count {count} has no number word. Scenes hold 1 to {max(NUMBERS)} things of a kind."
        )
    return f"{NUMBERS[count]} {colour} {shape}{'es' if shape.endswith('s') else 's'}"


def is_heldout(sentence: str) -> bool:
    """Whether this caption, without its background phrase, is held out: a function of the text."""
    return int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:4], "big") % HELDOUT_ONE_IN == 0


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corner points of a polygon shape about the origin, within radius 1.05, so that things stay apart."""

    def ring(points: int, start: float, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
        turn = [start + 2 * math.pi * i / points for i in range(points)]
        return [
            (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
            for i, a in enumerate(turn)
        ]

    if shape == "square":
        return [(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)]
    if shape == "triangle":
        return [(0.0, -0.9), (0.85, 0.6), (-0.85, 0.6)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "star":
        return ring(10, -math.pi / 2, (1.0, 0.42))
    if shape == "cross":
        a, b = 0.32, 0.92
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "heart":
        turn = [2 * math.pi * i / 40 for i in range(40)]
        return [
            (
                math.sin(a) ** 3,
                -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 17,
            )
            for a in turn
        ]
    raise ValueError(f"shape {shape!r} is unknown. Known shapes: {', '.join(SHAPES)}.")


def draw_scene(scene: Scene, side_px: int = 64) -> Image.Image:
    """Renders a scene, antialiased, as an RGB image of `side_px` x `side_px` pixels."""
    big_px = side_px * SUPERSAMPLING
    ground = WHITE if scene.background is None else COLOURS[scene.background]
    image = Image.new("RGB", (big_px, big_px), ground)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, r = thing.x * big_px, thing.y * big_px, thing.radius * big_px
        ink = COLOURS[thing.colour]
        if thing.shape in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
            if thing.shape == "ring":
                pen.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=ground)
        else:
            pen.polygon([(x + r * px, y + r * py) for px, py in _outline(thing.shape)], fill=ink)
    return image.resize((side_px, side_px), Image.Resampling.BOX)


def _scatter(rng: np.random.Generator, radii: list[float]) -> tuple[list[tuple[float, float]], float]:
    """Random centres that keep discs of these radii apart and inside, and the factor the radii shrank by."""
    shrink = 1.0
    while True:
        for _ in range(20):
            centres: list[tuple[float, float]] = []
            for radius in radii:
                r = radius * shrink
                x, y = (float(v) for v in rng.uniform(r + 0.02, 0.98 - r, size=2))
                apart = all(
                    math.hypot(x - a, y - b) > r + other * shrink + 0.03
                    for (a, b), other in zip(centres, radii, strict=False)
                )
                if not apart:
                    break
                centres.append((x, y))
            if len(centres) == len(radii):
                return centres, shrink
        shrink *= 0.9


def _place(
    kinds: list[tuple[str, str]], centres: list[tuple[float, float]], radii: list[float]
) -> tuple[Thing, ...]:
    return tuple(
        Thing(colour=c, shape=s, x=x, y=y, radius=r)
        for (c, s), (x, y), r in zip(kinds, centres, radii, strict=True)
    )


def _draw_kind(rng: np.random.Generator, colours: list[str]) -> tuple[str, str]:
    return colours[int(rng.integers(len(colours)))], SHAPES[int(rng.integers(len(SHAPES)))]


def _groups(
    rng: np.random.Generator, kinds: list[tuple[str, str]], counts: list[int]
) -> tuple[tuple[Thing, ...], str]:
    total = sum(counts)
    radius = float(rng.uniform(0.17, 0.34)) if total == 1 else float(rng.uniform(0.11, 0.2))
    members = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    centres, shrink = _scatter(rng, [radius] * total)
    sentence = " and ".join(noun_phrase(*kind, count) for kind, count in zip(kinds, counts, strict=True))
    return _place(members, centres, [radius * shrink] * total), sentence


def _corner(rng: np.random.Generator, kind: tuple[str, str]) -> tuple[tuple[Thing, ...], str]:
    corner = list(CORNERS)[int(rng.integers(len(CORNERS)))]
    x, y = (float(v) for v in np.array(CORNERS[corner]) + rng.uniform(-0.05, 0.05, size=2))
    radius = float(rng.uniform(0.12, 0.2))
    return _place([kind], [(x, y)], [radius]), f"{noun_phrase(*kind)} in the {corner} corner"


def _related(rng: np.random.Generator, kinds: list[tuple[str, str]]) -> tuple[tuple[Thing, ...], str]:
    relation: Relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    along = np.array(RELATIONS[relation], dtype=float)
    radii = [float(r) for r in rng.uniform(0.14, 0.22, size=2)]
    gap = (radii[0] + radii[1] + float(rng.uniform(0.03, 0.1))) / 2
    middle = 0.5 + rng.uniform(-0.04, 0.04, size=2)
    aside = np.abs(along[::-1]) * rng.uniform(-0.06, 0.06)
    first, second = middle + along * gap + aside, middle - along * gap - aside
    centres = [(float(first[0]), float(first[1])), (float(second[0]), float(second[1]))]
    return _place(kinds, centres, radii), f"{noun_phrase(*kinds[0])} {relation} {noun_phrase(*kinds[1])}"


def _compose(rng: np.random.Generator, background: str | None) -> tuple[tuple[Thing, ...], str]:
    colours = [c for c in COLOURS if c != background]
    first, second = _draw_kind(rng, colours), _draw_kind(rng, colours)
    while second == first:
        second = _draw_kind(rng, colours)
    form = rng.uniform()
    if form < 0.15:
        return _groups(rng, [first], [1])
    if form < 0.25:
        return _corner(rng, first)
    if form < 0.5:
        return _groups(rng, [first], [int(rng.integers(2, 5))])
    if form < 0.8:
        return _related(rng, [first, second])
    return _groups(rng, [first, second], [int(n) for n in rng.integers(1, 3, size=2)])


def sample_scene(rng: np.random.Generator, heldout: bool = False) -> Scene:
    """Draws a random scene from the training captions, or from the held-out tenth."""
    background = list(COLOURS)[int(rng.integers(len(COLOURS)))] if rng.uniform() < 0.25 else None
    while True:
        things, sentence = _compose(rng, background)
        if is_heldout(sentence) == heldout:
            return Scene(things=things, sentence=sentence, background=background)
