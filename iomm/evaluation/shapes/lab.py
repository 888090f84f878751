"""Colours in CIELAB (D65), where distance is about what the eye sees, and the nearest named one."""

import functools

import numpy as np

from iomm.evaluation.shapes.scene import COLOURS

_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _RGB_TO_XYZ.sum(axis=1)
_MAX_DISTANCE = 30.0  # to the named colour
_MIN_LEAD = 6.0  # the second nearest is farther than the nearest by at least this


@functools.cache
def _linear() -> np.ndarray:
    level = np.arange(256) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """uint8 sRGB (..., 3) -> CIELAB (..., 3), fp64."""
    xyz = _linear()[rgb] @ (_RGB_TO_XYZ.T / _WHITE)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of CIELAB colours (..., 3): about 2 is just visible, 100 is black to white."""
    return np.sqrt(np.square(a - b).sum(axis=-1))


@functools.cache
def _palette() -> np.ndarray:
    return to_lab(np.array(list(COLOURS.values()), dtype=np.uint8))


def colour_name(lab_3: np.ndarray) -> str | None:
    """The named colour that this one is; None if it is far from all of them or between two."""
    distance_C = distance(_palette(), lab_3)
    first, second = np.argsort(distance_C)[:2]
    near = distance_C[first] <= _MAX_DISTANCE and distance_C[second] - distance_C[first] >= _MIN_LEAD
    return list(COLOURS)[first] if near else None
