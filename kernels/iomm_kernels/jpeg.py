"""Loads the compiled JPEG decoder, csrc/jpeg_view.c, on first use.

It needs no torch, only NumPy. A call releases Python's lock, so threads decode side by side. `IOMM_CSRC_DIR`
names another folder of built libraries, as in `csrc`.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from iomm_kernels import build

_REASON_BYTES = 200  # libjpeg's JMSG_LENGTH_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What is made of a JPEG: a part of the image as it is decoded at 1 / `reduce`, resized, mirrored."""

    width: int  # of the whole image, as its header says
    height: int
    reduce: int  # 1, 2, 4 or 8
    left: int  # of the part, in pixels of the reduced image
    top: int
    columns: int
    rows: int
    out_width: int
    out_height: int
    mirrored: bool  # left and right exchanged
    upside_down: bool  # top and bottom


class _Cut(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in Cut.__dataclass_fields__]


def problem() -> str | None:
    """Why `view` cannot be called; None if it can."""
    return _load()[1]


def view(data: bytes, cut: Cut, image_CHW: np.ndarray) -> str | None:
    """A part of a gray or three-component JPEG, resized as Pillow's bicubic does it.

    Args:
        data: the file.
        cut: the part, which lies inside the image, and the wanted size.
        image_CHW: filled; uint8 (3, H, W), contiguous.

    Returns:
        Why libjpeg-turbo does not decode the file, its warnings included; None if it does.
    """
    decode, missing = _load()
    assert decode is not None, missing
    assert cut.reduce in (1, 2, 4, 8), cut
    assert min(cut.left, cut.top) >= 0, cut
    assert min(cut.columns, cut.rows, cut.out_width, cut.out_height) >= 1, cut
    assert image_CHW.dtype == np.uint8
    assert image_CHW.shape == (3, cut.out_height, cut.out_width), (image_CHW.shape, cut)
    assert image_CHW.flags.c_contiguous
    reason = ctypes.create_string_buffer(_REASON_BYTES)
    if decode(data, len(data), _Cut(*astuple(cut)), image_CHW.ctypes.data, reason):
        return reason.value.decode("utf-8", "replace")
    return None


@functools.cache
def _load() -> tuple[Callable[..., int] | None, str | None]:
    """The function, or why there is none."""
    folder = Path(os.environ.get("IOMM_CSRC_DIR") or build.HERE)
    if stale := build.JPEG.stale(folder):
        return None, stale
    try:
        function = ctypes.CDLL(str(folder / build.JPEG.file)).iomm_jpeg_view
    except OSError as error:
        return None, f"does not load: {error}"
    function.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.POINTER(_Cut),
        ctypes.c_void_p,
        ctypes.c_char_p,
    ]
    return function, None
