"""What of an image is shown, and how large.

All sizes and offsets are in pixels of the upright image, unless a name says otherwise. H x W pixels of an
image, C = 3 channels.
"""

from dataclasses import dataclass

import numpy as np

# Sizes at which a JPEG can be decoded directly, by leaving out high frequencies: 1/8, 1/4, 1/2.
# Those in between (3/8, 5/8, ...) are slower than the full size.
REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image, from its upper left corner."""

    left_px: int
    top_px: int
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class View:
    """The picture that a decoder makes of an image file, width_px x height_px.

    Without `crop`: the largest centred part of that shape, resized. With it: a part of exactly that size, at
    the image's own resolution; only of an image that is too small for it the largest part, enlarged.
    """

    width_px: int
    height_px: int
    # Where the part lies between the left and right, upper and lower ends of the image: (x, y) in [0, 1).
    crop: tuple[float, float] | None = None
    flip: bool = False  # left and right exchanged, last of all

    def __post_init__(self) -> None:
        if min(self.width_px, self.height_px) < 1:
            raise ValueError(f"a view of {self.width_px} x {self.height_px} px; sides are at least 1 px.")

    @property
    def name(self) -> str:
        """Says exactly what is shown: together with the image's content it says every pixel."""
        where = "" if self.crop is None else f" at {self.crop[0]!r} {self.crop[1]!r}"
        return f"{self.width_px}x{self.height_px}{where}{' flip' * self.flip}"

    def box(self, image_width_px: int, image_height_px: int) -> Box:
        """The part of an upright image that is shown."""
        width = min(image_width_px, max(1, round(image_height_px * self.width_px / self.height_px)))
        height = min(image_height_px, max(1, round(image_width_px * self.height_px / self.width_px)))
        if self.crop is None:
            return Box((image_width_px - width) // 2, (image_height_px - height) // 2, width, height)
        if image_width_px >= self.width_px and image_height_px >= self.height_px:
            width, height = self.width_px, self.height_px
        x, y = self.crop
        left, top = int(x * (image_width_px - width + 1)), int(y * (image_height_px - height + 1))
        return Box(left, top, width, height)

    def mirrored(self, image_HWC: np.ndarray) -> np.ndarray:
        """The picture with left and right exchanged if the view says so: a view of the same pixels."""
        return image_HWC[:, ::-1] if self.flip else image_HWC


def reduce(box: Box, width_px: int, height_px: int) -> tuple[int, Box]:
    """By how much a JPEG may be shrunk while it is decoded, so that `box` still has the wanted size.

    Returns:
        1, 2, 4 or 8, and the box with its edges moved inwards or up to multiples of that number, by less than
        one pixel of the shrunk image.
    """
    for factor in REDUCTIONS:
        if box.width_px >= factor * width_px and box.height_px >= factor * height_px:
            edges = (box.left_px, box.top_px, box.width_px, box.height_px)
            return factor, Box(*(edge // factor * factor for edge in edges))
    return 1, box
