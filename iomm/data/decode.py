"""Image file to a square of uint8 pixels, on the CPU with Pillow.

C = 3 channels (red, green, blue), H = W = side_px.

The whole-image view: turned upright, on white, the centre square, antialiased to the side. A decoder on the
GPU, random crops at native resolution and aspect-ratio buckets are other functions of (bytes, geometry); this
one stays the reference for evaluation. Colour profiles are not applied: samples are taken for sRGB.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from iomm.data.errors import BadSample

MAX_PIXELS = 100_000_000
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def decode_image(data: bytes, side_px: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The centre square of a JPEG, PNG or WebP file, upright, on white, resized with antialiasing (bicubic).

    An image that already is side_px x side_px keeps its decoded pixels. Of an animation the first frame is
    taken.

    Args:
        data: the file's bytes.
        side_px: side of the result.
        max_pixels: an image with more is refused by its header, before any pixel is decoded.

    Returns:
        uint8 (3, side_px, side_px), contiguous.

    Raises:
        BadSample: not such a file, damaged, truncated, or too large.
    """
    # Pillow raises a dozen kinds of error on damaged files (OSError, SyntaxError, struct.error, zlib.error,
    # ...): here every one of them is about this file, and none may end the run.
    try:
        with _open(data) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise BadSample(
                    f"{width} x {height} px in the header, more than the limit of {max_pixels} px"
                )
            file.load()
            image = _rgb(ImageOps.exif_transpose(file))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (side, side):
            image = image.crop((left, top, left + side, top + side))
        if side != side_px:
            image = image.resize((side_px, side_px), Image.Resampling.BICUBIC)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"cannot be decoded: {type(error).__name__}: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _open(data: bytes) -> ImageFile:
    """Pillow's reader for the format that the first bytes name; reads the header only.

    `Image.open` would also try forty other formats, and its own pixel limit is a setting of the whole
    process.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(io.BytesIO(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(data))
    raise BadSample(
        "the file is empty" if not data else f"not a JPEG, PNG or WebP file: starts with {data[:8].hex(' ')}"
    )


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB: transparency on white, 16-bit gray / 257 (convert would clip it)."""
    if image.mode in _SIXTEEN_BIT:
        gray_HW = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray_HW * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
