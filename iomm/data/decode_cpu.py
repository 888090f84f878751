"""Image file to uint8 pixels on the CPU, fast for JPEG, in one of two ways whose pixels are at most one level
apart, and that far from Pillow's bicubic with antialiasing:

    rows    libjpeg-turbo row by row into a resize of our own (csrc/jpeg_view.c), if `make kernels` built it
    whole   libjpeg-turbo through simplejpeg, then torch's uint8 resize

C = 3 channels (red, green, blue), H and W the view's height and width.

A JPEG much larger than the view is decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled inverse DCT), so the crop's
edges lie on multiples of that many pixels. PNG, WebP and CMYK JPEG go Pillow's way, `decode.py`.
"""

import math
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from simplejpeg import decode_jpeg
from torch import Tensor

from iomm.config import MAX_IMAGE_PIXELS
from iomm.data.decode import decode_view
from iomm.data.decode_header import Header, probe
from iomm.data.errors import BadSample
from iomm.data.view import Box, View, reduce
from iomm_kernels import jpeg

_KEPT_BYTES = 48 << 20  # of scratch memory between images: a 16-megapixel image; larger ones get their own
_held = threading.local()
FAST_MODES = ("RGB", "L")  # JPEGs that libjpeg-turbo itself turns into RGB; CMYK takes Pillow


class CpuDecoder:
    """A `Decoder` of one file at a time, safe from several threads.

    It is stricter than Pillow: a JPEG that libjpeg-turbo warns about (flipped bytes, a missing end) is a bad
    sample, because what it then decodes is partly invented.
    """

    whole_batches = False
    rescued = 0

    def __init__(
        self, max_pixels: int = MAX_IMAGE_PIXELS, *, way: Literal["rows", "whole"] | None = None
    ) -> None:
        """
        Args:
            max_pixels: an image with more is refused by its header.
            way: how JPEGs are decoded; None: row by row where that was built.

        Raises:
            ValueError: it is to be row by row, and that was not built.
        """
        problem = jpeg.problem()
        if way == "rows" and problem is not None:
            raise ValueError(f"JPEGs cannot be decoded row by row: the library {problem}.")
        self._max_pixels = max_pixels
        self._decode_jpeg = _decode_rows if problem is None and way != "whole" else _decode_whole

    def decode(
        self, files: Sequence[bytes], views: Sequence[View], into: Sequence[Tensor] | None = None
    ) -> list[Tensor | BadSample]:
        """As `Decoder.decode`."""
        places = into or [None] * len(files)
        return [self._decode(*job) for job in zip(files, views, places, strict=True)]

    def _decode(self, data: bytes, view: View, into: Tensor | None) -> Tensor | BadSample:
        try:
            header = probe(data, max_pixels=self._max_pixels)
            if not is_plain_jpeg(header):
                return decode_view(data, view, max_pixels=self._max_pixels)
            return self._decode_jpeg(data, header, view, into)
        except BadSample as error:
            return error


def jpeg_way() -> str:
    """How JPEGs are decoded on this machine's CPU, and why not faster."""
    problem = jpeg.problem()
    if problem is None:
        return "JPEGs row by row (csrc)"
    return f"JPEGs by simplejpeg and torch; the faster library {problem}"


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


def _decode_rows(data: bytes, header: Header, view: View, into: Tensor | None) -> Tensor:
    """A view of a plain JPEG, row by row; `into` itself where that has its shape and nothing is turned.

    Raises:
        BadSample: damaged, truncated, or libjpeg-turbo warned about it.
    """
    cut = part_of(header, view)
    shape = (3, cut.out_height, cut.out_width)
    there = into is not None and not header.sideways and into.shape == shape
    image_CHW = into if into is not None and there else torch.empty(shape, dtype=torch.uint8)
    if reason := jpeg.view(data, cut, image_CHW.numpy()):
        raise BadSample(f"cannot be decoded: {reason}")
    return image_CHW.transpose(1, 2).contiguous() if header.sideways else image_CHW


def part_of(header: Header, view: View) -> jpeg.Cut:
    """What of a stored JPEG a view is made of; one that lies sideways is to be turned after that."""
    factor, box, (height, width) = crop_and_size(header, view)
    up, across = (axis in header.mirrored_axes for axis in (0, 1))
    across ^= view.flip
    # Rows and columns of a picture that lies sideways change places last.
    mirrored, upside_down = (up, across) if header.sideways else (across, up)
    return jpeg.Cut(
        width=header.width_px,
        height=header.height_px,
        reduce=factor,
        left=box.left_px // factor,
        top=box.top_px // factor,
        columns=box.width_px // factor,
        rows=box.height_px // factor,
        out_width=width,
        out_height=height,
        mirrored=mirrored,
        upside_down=upside_down,
    )


def _decode_whole(data: bytes, header: Header, view: View, _into: Tensor | None) -> Tensor:
    """A view of a plain JPEG, decoded whole.

    Raises:
        BadSample: damaged, truncated, or libjpeg-turbo warned about it.
    """
    factor, box, size_HW = crop_and_size(header, view)
    shape_HWC = (-(-header.height_px // factor), -(-header.width_px // factor), 3)
    try:
        image_HWC = decode_jpeg(
            data,
            min_height=shape_HWC[0],
            min_width=shape_HWC[1],
            min_factor=factor,
            buffer=_scratch("image", shape_HWC),
        )
    except ValueError as error:
        raise BadSample(f"cannot be decoded: {error}") from error
    left, top, width, height = (
        edge // factor for edge in (box.left_px, box.top_px, box.width_px, box.height_px)
    )
    # Copies are NumPy's: torch would start threads for each one, and there are decoding threads already.
    part_HWC = _scratch("part", (height, width, 3))
    np.copyto(part_HWC, image_HWC[top : top + height, left : left + width])
    return torch.from_numpy(planes(view.mirrored(header.upright(_resize(part_HWC, size_HW)))))


def _scratch(name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Memory of this thread that its next image overwrites: fresh pages cost about 5 % of the time."""
    size = math.prod(shape)
    held: np.ndarray | None = getattr(_held, name, None)
    if held is None or held.size < size:
        held = np.empty(size, np.uint8)
        if size <= _KEPT_BYTES:
            setattr(_held, name, held)
    return held[:size].reshape(shape)


def planes(image_HWC: np.ndarray) -> np.ndarray:
    """(H, W, C) of any strides to (C, H, W), contiguous."""
    image_CHW = np.ascontiguousarray(image_HWC.transpose(2, 0, 1))
    # A mirrored axis of one pixel counts as contiguous with its negative stride, which torch does not take.
    return image_CHW if min(image_CHW.strides) > 0 else image_CHW.copy()


def _resize(image_HWC: np.ndarray, size_HW: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialiasing, in memory of its own; an image of the wanted size keeps its pixels."""
    if image_HWC.shape[:2] == size_HW:
        return image_HWC.copy()
    image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(image_1CHW, size_HW, mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()
