"""Image file to uint8 pixels on the CPU with Pillow: the reference that evaluation uses, and every format.

C = 3 channels (red, green, blue), H and W the view's height and width.

The whole-image view: turned upright, on white, the centre, antialiased to the wanted size. `decode_cpu` and
`decode_dali` do the same faster for JPEG. Colour profiles are not applied: samples are taken for sRGB.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from iomm.config import MAX_IMAGE_PIXELS
from iomm.data.decode_header import check_pixels, open_image
from iomm.data.errors import BadSample
from iomm.data.view import View

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def decode_image(data: bytes, side_px: int, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Tensor:
    """The centre square of a JPEG, PNG or WebP file, as `decode_view` makes it.

    Returns:
        uint8 (3, side_px, side_px), contiguous.

    Raises:
        BadSample: not such a file, damaged, truncated, or too large.
    """
    return decode_view(data, View(side_px, side_px), max_pixels=max_pixels)


def decode_view(data: bytes, view: View, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Tensor:
    """A view of a JPEG, PNG or WebP file, upright, on white, resized with antialiasing (bicubic).

    An image that already has the view's size keeps its decoded pixels. Of an animation the first frame is
    taken.

    Args:
        data: the file's bytes.
        view: what of the image is shown.
        max_pixels: an image with more is refused by its header, before any pixel is decoded.

    Returns:
        uint8 (3, H, W), contiguous.

    Raises:
        BadSample: not such a file, damaged, truncated, or too large.
    """
    # Pillow raises a dozen kinds of error on damaged files (OSError, SyntaxError, struct.error, zlib.error,
    # ...): here every one of them is about this file, and none may end the run.
    try:
        with open_image(data) as file:
            check_pixels(*file.size, max_pixels)
            file.load()
            image = _rgb(ImageOps.exif_transpose(file))
        box, wanted = view.box(*image.size), (view.width_px, view.height_px)
        if image.size != (box.width_px, box.height_px):
            right, bottom = box.left_px + box.width_px, box.top_px + box.height_px
            image = image.crop((box.left_px, box.top_px, right, bottom))
        if image.size != wanted:
            image = image.resize(wanted, Image.Resampling.BICUBIC)
        if view.flip:
            image = ImageOps.mirror(image)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"cannot be decoded: {type(error).__name__}: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class PillowDecoder:
    """`decode_view` as a `Decoder`: one file at a time, safe from several threads."""

    whole_batches = False
    rescued = 0

    def __init__(self, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self._max_pixels = max_pixels

    def decode(
        self, files: Sequence[bytes], views: Sequence[View], into: Sequence[Tensor] | None = None
    ) -> list[Tensor | BadSample]:
        """As `Decoder.decode`."""
        return [self._decode(data, view) for data, view in zip(files, views, strict=True)]

    def _decode(self, data: bytes, view: View) -> Tensor | BadSample:
        try:
            return decode_view(data, view, max_pixels=self._max_pixels)
        except BadSample as error:
            return error


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB: transparency on white, 16-bit gray / 257 (convert would clip it)."""
    if image.mode in _SIXTEEN_BIT:
        gray_HW = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray_HW * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
