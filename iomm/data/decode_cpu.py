"""Image file to uint8 pixels on the CPU, fast for JPEG: libjpeg-turbo through simplejpeg, then torch's uint8
resize, which is Pillow's bicubic with antialiasing in vector instructions (at most one level apart).

C = 3 channels (red, green, blue), H and W the view's height and width.

A JPEG much larger than the view is decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled inverse DCT), so the crop's
edges lie on multiples of that many pixels. PNG, WebP and CMYK JPEG go Pillow's way, `decode.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from simplejpeg import decode_jpeg
from torch import Tensor

from iomm.data.decode import decode_view
from iomm.data.decode_header import MAX_PIXELS, Header, probe
from iomm.data.errors import BadSample
from iomm.data.view import Box, View, reduce

FAST_MODES = ("RGB", "L")  # JPEGs that libjpeg-turbo itself turns into RGB; CMYK takes Pillow


class CpuDecoder:
    """A `Decoder` of one file at a time, safe from several threads.

    It is stricter than Pillow: a JPEG that libjpeg-turbo warns about (flipped bytes, a missing end) is a bad
    sample, because what it then decodes is partly invented.
    """

    whole_batches = False

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels

    def decode(self, files: Sequence[bytes], view: View) -> list[Tensor | BadSample]:
        """As `Decoder.decode`."""
        return [self._decode(data, view) for data in files]

    def _decode(self, data: bytes, view: View) -> Tensor | BadSample:
        try:
            header = probe(data, max_pixels=self._max_pixels)
            if not is_plain_jpeg(header):
                return decode_view(data, view, max_pixels=self._max_pixels)
            return _decode_jpeg(data, header, view)
        except BadSample as error:
            return error


def is_plain_jpeg(header: Header) -> bool:
    """Whether a fast decoder takes the file: a JPEG of gray or three components."""
    return header.format == "jpeg" and header.mode in FAST_MODES


def crop_and_size(header: Header, view: View) -> tuple[int, Box, tuple[int, int]]:
    """How a view is cut from a stored JPEG: by how much it is shrunk in decoding (1, 2, 4 or 8), which box of
    the stored image that leaves, and the (height, width) that the box is resized to before it is turned.
    """
    height, width = view.height_px, view.width_px
    if header.sideways:
        height, width = width, height
    factor, box = reduce(header.stored(view.box(*header.upright_size_px)), width, height)
    return factor, box, (height, width)


def _decode_jpeg(data: bytes, header: Header, view: View) -> Tensor:
    """A view of a plain JPEG.

    Raises:
        BadSample: damaged, truncated, or libjpeg-turbo warned about it.
    """
    factor, box, size_HW = crop_and_size(header, view)
    try:
        image_HWC = decode_jpeg(
            data,
            min_height=-(-header.height_px // factor),
            min_width=-(-header.width_px // factor),
            min_factor=factor,
        )
    except ValueError as error:
        raise BadSample(f"cannot be decoded: {error}") from error
    left, top, width, height = (
        edge // factor for edge in (box.left_px, box.top_px, box.width_px, box.height_px)
    )
    # Copies are NumPy's: torch would start threads for each one, and there are decoding threads already.
    part_HWC = np.ascontiguousarray(image_HWC[top : top + height, left : left + width])
    return torch.from_numpy(planes(header.upright(_resize(part_HWC, size_HW))))


def planes(image_HWC: np.ndarray) -> np.ndarray:
    """(H, W, C) of any strides to (C, H, W), contiguous."""
    return np.ascontiguousarray(image_HWC.transpose(2, 0, 1))


def _resize(image_HWC: np.ndarray, size_HW: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialiasing; an image of the wanted size is returned as it is."""
    if image_HWC.shape[:2] == size_HW:
        return image_HWC
    image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(image_1CHW, size_HW, mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()
