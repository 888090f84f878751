"""Scenes of coloured shapes: what they are, and how they are drawn.

A scene is data; its picture is a pure function of it. Positions and sizes are fractions of the picture's
side, x to the right and y down, so a scene draws at any size. A thing stands at the centroid of its shape.
H x W pixels, P corner points.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE_PX = 64
SUPERSAMPLING = 8
Box = tuple[int, int, int, int]  # left, top, right, bottom, px; the last two outside

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (221, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (248, 214, 40),
    "green": (45, 160, 70),
    "blue": (40, 90, 215),
    "purple": (130, 60, 175),
    "pink": (245, 140, 185),
    "black": (25, 25, 25),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (205, 205, 205),
    "sand": (243, 232, 205),
    "sky": (200, 222, 245),
    "mint": (205, 238, 214),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape of one colour. `x`, `y` and `radius` are fractions of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything a picture shows. Things neither touch each other nor the picture's border."""

    things: tuple[Thing, ...]
    background: str


def _ring(points: int, radii: tuple[float, ...], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    turn = [start + 2 * math.pi * i / points for i in range(points)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(turn)
    ]


def _plus(arm: float, reach: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -reach), (arm, -reach), (arm, -arm)]
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cos, sin
    return [(x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter]


def _heart() -> list[tuple[float, float]]:
    turn = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 17,
        )
        for a in turn
    ]


def polygon_area(points_P2: np.ndarray) -> float:
    """Area of a polygon, by the shoelace formula."""
    x, y = points_P2.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _centred(points: list[tuple[float, float]]) -> np.ndarray:
    """The corner points with their polygon's centroid at the origin, (P, 2)."""
    points_P2 = np.array(points)
    x, y = points_P2.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    centroid = ((points_P2 + np.roll(points_P2, -1, axis=0)) * cross[:, None]).sum(0) / (3 * cross.sum())
    return points_P2 - centroid


# Outlines of radius 1: about equally large to the eye, and upright.
OUTLINES: dict[str, np.ndarray] = {
    "circle": _centred(_ring(64, (0.88,))),
    "square": _centred([(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)]),
    "triangle": _centred(_ring(3, (1.04,))),
    "star": _centred(_ring(10, (1.2, 0.46))),
    "cross": _centred(_plus(0.33, 1.0)),
    "heart": _centred(_heart()),
}
SHAPES = tuple(OUTLINES)


@functools.cache
def reach(shape: str) -> float:
    """Distance of the farthest corner from the centre of an outline of radius 1."""
    return float(np.hypot(*OUTLINES[shape].T).max())


def coverage(shape: str, x_px: float, y_px: float, radius_px: float, box: Box) -> np.ndarray:
    """What share of each pixel of a box a shape covers, fp32 (H, W) of the box."""
    left, top, right, bottom = box
    mask = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    points_P2 = (OUTLINES[shape] * radius_px + (x_px - left, y_px - top)) * SUPERSAMPLING
    ImageDraw.Draw(mask).polygon(points_P2.ravel().tolist(), fill=255)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def box_around(x_px: float, y_px: float, reach_px: float, side_px: int) -> Box:
    """The pixels within reach of a point, cut at the picture's border."""
    return (
        max(0, math.floor(x_px - reach_px)),
        max(0, math.floor(y_px - reach_px)),
        min(side_px, math.ceil(x_px + reach_px)),
        min(side_px, math.ceil(y_px + reach_px)),
    )


def render(scene: Scene, side_px: int = SIDE_PX) -> np.ndarray:
    """The antialiased picture of a scene, uint8 RGB (side, side, 3)."""
    image_HW3 = np.empty((side_px, side_px, 3), dtype=np.float32)
    image_HW3[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        x, y, radius = thing.x * side_px, thing.y * side_px, thing.radius * side_px
        left, top, right, bottom = box = box_around(x, y, radius * reach(thing.shape), side_px)
        part_HW3 = image_HW3[top:bottom, left:right]
        alpha_HW1 = coverage(thing.shape, x, y, radius, box)[..., None]
        part_HW3 += alpha_HW1 * (np.array(COLOURS[thing.colour], dtype=np.float32) - part_HW3)
    return (image_HW3 + 0.5).astype(np.uint8)
