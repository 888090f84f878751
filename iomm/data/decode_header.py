"""What an image file's header says, without decoding a pixel: the cheap check that comes before any decoder.

C = 3 channels, H and W as the file stores the image, before it is turned upright.
"""

import functools
import io
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from iomm.config import MAX_IMAGE_PIXELS
from iomm.data.errors import BadSample
from iomm.data.view import Box

Format = Literal["jpeg", "png", "webp"]
_MAX_SCANS = 100  # of a JPEG; encoders write about ten
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # EXIF tag
# Orientations that, after rows and columns changed places (5 ... 8), mirror left and right, up and down.
_MIRROR_X, _MIRROR_Y = (2, 3, 6, 7), (3, 4, 7, 8)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of an image file promise."""

    format: Format
    width_px: int  # as stored
    height_px: int  # as stored
    orientation: int  # EXIF, 1 ... 8; 1: the image is stored upright
    mode: str  # Pillow's: RGB, L, CMYK, P, I;16, RGBA, ...

    @property
    def sideways(self) -> bool:
        """Whether turning the image upright exchanges width and height."""
        return self.orientation >= 5

    @property
    def mirrored_axes(self) -> tuple[int, ...]:
        """Which of rows (0) and columns (1) are then to be reversed."""
        return (0,) * (self.orientation in _MIRROR_Y) + (1,) * (self.orientation in _MIRROR_X)

    @property
    def upright_size_px(self) -> tuple[int, int]:
        """(width, height) as people see the image."""
        return (self.height_px, self.width_px) if self.sideways else (self.width_px, self.height_px)

    def stored(self, box: Box) -> Box:
        """Where a box of the upright image lies in the stored one."""
        width, height = self.upright_size_px
        left, top = box.left_px, box.top_px
        mirrored = (width - left - box.width_px, height - top - box.height_px)
        if self.orientation in _MIRROR_X:
            left = mirrored[0]
        if self.orientation in _MIRROR_Y:
            top = mirrored[1]
        if self.sideways:
            return Box(top, left, box.height_px, box.width_px)
        return Box(left, top, box.width_px, box.height_px)

    def upright(self, stored_HWC: np.ndarray) -> np.ndarray:
        """The picture turned upright: a view of the same pixels, (W, H, C) where it lay sideways."""
        return np.flip(stored_HWC.swapaxes(0, 1) if self.sideways else stored_HWC, self.mirrored_axes)


def probe(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Header:
    """Read an image file's header.

    Args:
        data: the file's bytes.
        max_pixels: an image with more is refused.

    Raises:
        BadSample: not a JPEG, PNG or WebP file, a damaged header, or too many pixels.
    """
    # Pillow raises a dozen kinds of error on damaged files: here every one of them is about this file.
    try:
        with open_image(data) as file:
            header = _read(file, data)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"cannot be decoded: {type(error).__name__}: {error}") from error
    check_pixels(header.width_px, header.height_px, max_pixels)
    return header


def check_pixels(width_px: int, height_px: int, max_pixels: int) -> None:
    """Raises BadSample for an image of more than `max_pixels`."""
    if width_px * height_px > max_pixels:
        raise BadSample(f"{width_px} x {height_px} px in the header, more than the limit of {max_pixels} px")


def open_image(data: bytes) -> ImageFile:
    """Pillow's reader for the format that the first bytes name; reads the header only.

    `Image.open` would also try forty other formats, and its own pixel limit is a setting of the whole
    process.

    Raises:
        BadSample: another format, or a JPEG of too many scans. Whatever Pillow raises for a damaged header
            comes through.
    """
    if data.startswith(b"\xff\xd8\xff"):
        jpeg = JpegImageFile(io.BytesIO(data))
        _refuse_many_scans(jpeg, data)
        return jpeg
    if data.startswith(_PNG_SIGNATURE):
        return PngImageFile(io.BytesIO(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(data))
    raise BadSample(
        "the file is empty" if not data else f"not a JPEG, PNG or WebP file: starts with {data[:8].hex(' ')}"
    )


def _refuse_many_scans(file: JpegImageFile, data: bytes) -> None:
    """Every scan is a pass over all pixels: a small file could ask for hours."""
    assert file.fp is not None
    at = file.fp.tell()  # behind the marker of the first scan: its length, and its number of components
    if not file.info.get("progressive") and data[at + 2 : at + 3] >= bytes([file.layers]):
        return  # sequential, all components in one scan: what follows is not looked at
    if (scans := data.count(b"\xff\xda", at)) >= _MAX_SCANS:
        raise BadSample(f"a JPEG of {scans + 1} scans, more than the limit of {_MAX_SCANS}")


def _read(file: ImageFile, data: bytes) -> Header:
    format_: Format = "webp"
    if isinstance(file, JpegImageFile):
        format_ = "jpeg"
    elif isinstance(file, PngImageFile):
        format_ = "png"
        if "exif" not in file.info and (exif := next(_png_exif(data), None)):
            file.info["exif"] = exif  # it may stand behind the pixels
    if profile := file.info.get("icc_profile"):
        _say_profile(profile)
    # Pillow's own `getexif` of a PNG would decode the image in search of it; that of the base class does not.
    orientation = Image.Image.getexif(file).get(_ORIENTATION, 1)
    width_px, height_px = file.size
    return Header(format_, width_px, height_px, orientation if orientation in range(1, 9) else 1, file.mode)


def _png_exif(data: bytes) -> Iterator[bytes]:
    """EXIF blocks of a PNG file."""
    at = len(_PNG_SIGNATURE)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            yield b"Exif\0\0" + data[at + 8 : at + 8 + size]
        at += 12 + size


def _say_profile(profile: bytes) -> None:
    if not any("sRGB".encode(coding) in profile for coding in ("ascii", "utf-16-be")):
        say_profiles_ignored()


@functools.cache
def say_profiles_ignored() -> None:
    """Log, once a process, that colour profiles are not applied."""
    _log.warning(
        "an image has a colour profile that is not sRGB. Profiles are not applied: its colours are taken for "
        "sRGB, here and in every other such image. Convert them when making the shards if that matters."
    )
