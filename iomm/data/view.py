"""What of an image is shown: the largest centred part of the wanted shape, resized to the wanted size.

All sizes and offsets are in pixels of the upright image, unless a name says otherwise.
"""

from dataclasses import dataclass

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
    """The picture that a decoder makes of an image file: width_px x height_px of the image's centre."""

    width_px: int
    height_px: int

    def __post_init__(self) -> None:
        if min(self.width_px, self.height_px) < 1:
            raise ValueError(f"a view of {self.width_px} x {self.height_px} px; sides are at least 1 px.")

    def box(self, image_width_px: int, image_height_px: int) -> Box:
        """The part of an upright image that is shown: of the view's shape, as large as fits, centred."""
        width = min(image_width_px, max(1, round(image_height_px * self.width_px / self.height_px)))
        height = min(image_height_px, max(1, round(image_width_px * self.height_px / self.width_px)))
        return Box((image_width_px - width) // 2, (image_height_px - height) // 2, width, height)


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
