"""What a picture of the shapes world shows, found exactly: no part of it is learned.

    background   the median colour of the picture's rim; most of the rim has it, or nothing is found
    components   pixels that differ from it by far, connected
    colour       the median inside a component: the nearest named one in CIELAB, unless far or between two
    coverage     each pixel's place between background and colour: the outline to a part of a pixel
    shape        each shape is drawn with the component's centroid, area and softness of edge; the one that
                 overlaps most (share of the union), unless the overlap is small, another's is about as
                 large, or the edge is too soft

A component that fails a test is not dropped but kept as an object without shape or colour, with the reason.
Lengths are given for a picture of 64 px and scale with its side. H x W pixels, h x w those of a component.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from iomm.evaluation.shapes.lab import colour_name, distance, to_lab
from iomm.evaluation.shapes.scene import OUTLINES, SHAPES, SIDE_PX, Box, coverage, polygon_area

MIN_SIDE_PX = 32
RIM_PX = 2.0  # no scene reaches into it
RIM_SHARE = 0.75  # of the rim, that has the background's colour
RIM_DISTANCE = 12.0  # in CIELAB, from the background's colour
THING_DISTANCE = 24.0  # what differs less is a stain of the background; scenes differ by 50 and more
EDGE = 0.4  # a thing's pixel differs by this share of the greatest difference within two pixels
SPECK_PX2 = 20.0  # smaller components are specks: no things, but few are allowed
MAX_SPECKS_PX2 = 40.0  # of all specks together
MIN_UNIFORM = 0.8  # share of a component's inside that has its colour
UNIFORM_DISTANCE = 22.0
# By shape: a compact one overlaps much with whatever is compact (a circle with a square on its corner by
# 0.83), and what is thin suffers most from an autoencoder.
MIN_OVERLAP = {"circle": 0.88, "square": 0.85, "triangle": 0.83, "star": 0.79, "cross": 0.84, "heart": 0.86}
MIN_LEAD = 0.03  # the best shape's overlap is ahead of the second's by this
MAX_BLUR_PX = 1.6  # sigma of its edge

_MIN_BLUR_PX = 0.1  # of a drawn shape's own antialiasing, less is none
_MAX_CORRECTION = 3.0
_AREAS = {shape: polygon_area(points_P2) for shape, points_P2 in OUTLINES.items()}
_LENGTHS = {
    shape: float(np.hypot(*(points_P2 - np.roll(points_P2, 1, axis=0)).T).sum())
    for shape, points_P2 in OUTLINES.items()
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One component. Centre, radius and box (left, top, right, bottom) are fractions of the side."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float  # of the nearest shape
    box: tuple[float, float, float, float]
    confidence: float  # overlap with the nearest shape, in [0, 1]
    reason: str | None = None  # why shape or colour is None


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Everything in a picture, the surest first."""

    objects: tuple[Found, ...]
    background: tuple[int, int, int] | None  # RGB; None: the picture has none
    reason: str | None = None  # what is wrong with the picture as a whole

    @property
    def unclear(self) -> tuple[Found, ...]:
        """The objects that are no shape of the world, or whose colour has no name."""
        return tuple(found for found in self.objects if found.shape is None or found.colour is None)


def detect(image_HW3: np.ndarray) -> Detection:
    """Find the things in a picture.

    Args:
        image_HW3: uint8 RGB, a square of at least 32 px.
    Raises:
        ValueError: anything else.
    """
    side = _require_square(image_HW3)
    scale = side / SIDE_PX
    lab_HW3 = to_lab(image_HW3)
    rim_HW = np.ones((side, side), dtype=bool)
    rim = max(1, round(RIM_PX * scale))
    rim_HW[rim:-rim, rim:-rim] = False
    ground = np.median(image_HW3[rim_HW], axis=0).astype(np.uint8)
    away_HW = distance(lab_HW3, to_lab(ground))
    share = float((away_HW[rim_HW] < RIM_DISTANCE).mean())
    if share < RIM_SHARE:
        return Detection(objects=(), background=None, reason=f"only {share:.0%} of the rim is background")
    reach = 2 * round(2 * scale) + 1
    inside_HW = away_HW > np.maximum(THING_DISTANCE, EDGE * ndimage.maximum_filter(away_HW, reach))
    labels_HW, count = _label(inside_HW)
    sizes = np.bincount(labels_HW.ravel(), minlength=count + 1)
    boxes = ndimage.find_objects(labels_HW)
    things = [n for n in range(1, count + 1) if sizes[n] >= SPECK_PX2 * scale**2]
    objects = [_component(image_HW3, lab_HW3, ground, labels_HW == n, boxes[n - 1]) for n in things]
    objects.sort(key=lambda found: -found.confidence)
    specks = float(sizes[1:].sum() - sizes[things].sum()) / scale**2
    reason = f"specks cover {specks:.0f} px" if specks > MAX_SPECKS_PX2 else None
    return Detection(objects=tuple(objects), background=_rgb(ground), reason=reason)


def _require_square(image_HW3: np.ndarray) -> int:
    height, width = image_HW3.shape[:2]
    square = image_HW3.shape == (height, height, 3) and height >= MIN_SIDE_PX
    if not square or image_HW3.dtype != np.uint8:
        raise ValueError(
            f"a picture of shape {image_HW3.shape} and type {image_HW3.dtype}; the detector takes uint8 RGB "
            f"(side, side, 3) of at least {MIN_SIDE_PX} px. Crop or resize it."
        )
    return width


def _label(inside_HW: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the components, neighbours at corners included: (number of each pixel, 0 outside; how many)."""
    labels: Any = ndimage.label(inside_HW, structure=np.ones((3, 3)))  # annotated as either of two results
    return labels


def _rgb(colour_3: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(level) for level in colour_3)
    return red, green, blue


def _component(
    image_HW3: np.ndarray,
    lab_HW3: np.ndarray,
    ground: np.ndarray,
    own_HW: np.ndarray,
    extent: tuple[slice, slice],
) -> Found:
    """Name one component: `own_HW` are its pixels, `extent` the rows and columns that hold them."""
    side = len(image_HW3)
    scale = side / SIDE_PX
    margin = max(1, round(2 * scale))
    rows, columns = (slice(max(0, span.start - margin), min(side, span.stop + margin)) for span in extent)
    own_hw = own_HW[rows, columns]
    core_hw: np.ndarray = np.asarray(ndimage.binary_erosion(own_hw, iterations=max(1, round(scale)))) > 0
    if not core_hw.any():
        core_hw = own_hw
    part_hw3, lab_hw3 = image_HW3[rows, columns].astype(np.float64), lab_HW3[rows, columns]
    ink = np.median(part_hw3[core_hw], axis=0)
    lab = to_lab(ink.round().astype(np.uint8))
    uniform = float((distance(lab_hw3[core_hw], lab) < UNIFORM_DISTANCE).mean())

    step = ink - ground
    alpha_hw = ((part_hw3 - ground) @ step / (step @ step)).clip(0, 1)
    alpha_hw *= ndimage.binary_dilation(own_hw, iterations=margin)
    box = (columns.start, rows.start, columns.stop, rows.stop)
    fit = _fit(alpha_hw, box)

    shape, colour, reasons = fit.shape, colour_name(lab), []
    if uniform < MIN_UNIFORM:
        colour = None
        reasons.append(f"only {uniform:.0%} of it has one colour")
    elif colour is None:
        reasons.append(f"its colour {_rgb(ink)} has no name")
    if fit.overlap < MIN_OVERLAP[shape] or fit.lead < MIN_LEAD:
        reasons.append(f"no shape: like a {shape} by {fit.overlap:.2f}, {fit.lead:.2f} ahead of the next")
        shape = None
    elif fit.blur_px > MAX_BLUR_PX * scale:
        reasons.append(f"blurred: a {shape} blurred by {fit.blur_px:.1f} px")
        shape = None
    return Found(
        shape=shape,
        colour=colour,
        x=fit.x_px / side,
        y=fit.y_px / side,
        radius=fit.radius_px / side,
        box=(
            extent[1].start / side,
            extent[0].start / side,
            extent[1].stop / side,
            extent[0].stop / side,
        ),
        confidence=fit.overlap,
        reason="; ".join(reasons) or None,
    )


@dataclass(frozen=True)
class _Fit:
    shape: str
    x_px: float
    y_px: float
    radius_px: float
    blur_px: float  # sigma of the Gaussian that makes the shape's edge as soft
    overlap: float  # covered by both over covered by either
    lead: float  # over the second best


def _fit(alpha_hw: np.ndarray, box: Box) -> _Fit:
    """The shape that a coverage is most like: drawn with the same centroid, area and softness, it overlaps
    most."""
    left, top, right, bottom = box
    area = float(alpha_hw.sum())
    x_px = float(alpha_hw.sum(axis=0) @ (np.arange(left, right) + 0.5)) / area
    y_px = float(alpha_hw.sum(axis=1) @ (np.arange(top, bottom) + 0.5)) / area
    softness = _softness(alpha_hw)
    fits = []
    for shape in SHAPES:
        radius_px = math.sqrt(area / _AREAS[shape])
        sharp_hw = coverage(shape, x_px, y_px, radius_px, box)
        drawn_hw, blur_px = _soften(sharp_hw, softness, _LENGTHS[shape] * radius_px)
        shared = float(np.minimum(alpha_hw, drawn_hw).sum())
        overlap = shared / (area + float(drawn_hw.sum()) - shared)
        fits.append((overlap, shape, radius_px, blur_px))
    (second, *_), (overlap, shape, radius_px, blur_px) = sorted(fits)[-2:]
    return _Fit(shape, x_px, y_px, radius_px, blur_px, overlap, overlap - second)


def _softness(alpha_hw: np.ndarray) -> float:
    """Zero of pixels that are all or nothing; grows with the length and the width of soft edges, px^2."""
    return 4 * float((alpha_hw * (1 - alpha_hw)).sum())


def _soften(sharp_hw: np.ndarray, softness: float, length_px: float) -> tuple[np.ndarray, float]:
    """Blur a shape to a given softness: (blurred, sigma of the Gaussian in px).

    A straight edge of that length gains 4 length sigma / sqrt(pi); corners and thin parts gain less, so the
    first blur says how to correct it.
    """
    already = _softness(sharp_hw)
    missing = softness - already
    blur_px = missing / length_px * math.sqrt(math.pi) / 4
    if blur_px < _MIN_BLUR_PX:
        return sharp_hw, max(blur_px, 0.0)
    gained = _softness(ndimage.gaussian_filter(sharp_hw, blur_px)) - already
    blur_px *= min(missing / max(gained, 1e-9), _MAX_CORRECTION)
    return ndimage.gaussian_filter(sharp_hw, blur_px), blur_px
