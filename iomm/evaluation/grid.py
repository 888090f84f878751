"""Sheets of pictures with captions under them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN_PX = 6


def image_grid(
    pictures_BCHW: Tensor, columns: int, captions: Sequence[str] | None = None, *, cell_px: int = 128
) -> Image.Image:
    """A white sheet of uint8 RGB pictures, row by row, each scaled to `cell_px` with its caption in one or
    two lines."""
    if captions is not None and len(captions) != len(pictures_BCHW):
        raise ValueError(
            f"{len(pictures_BCHW)} pictures and {len(captions)} captions; give one caption a picture."
        )
    font = ImageFont.load_default(11)
    text_px = 30 if captions is not None else 0
    rows = -(-len(pictures_BCHW) // columns)
    step_x, step_y = cell_px + MARGIN_PX, cell_px + text_px + MARGIN_PX
    sheet = Image.new("RGB", (columns * step_x + MARGIN_PX, rows * step_y + MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures_BCHW.cpu().permute(0, 2, 3, 1).numpy()):
        x, y = MARGIN_PX + i % columns * step_x, MARGIN_PX + i // columns * step_y
        sheet.paste(Image.fromarray(picture).resize((cell_px, cell_px), Image.Resampling.BICUBIC), (x, y))
        if captions is not None:
            lines = textwrap.wrap(captions[i], max(8, cell_px // 6), max_lines=2, placeholder="...")
            draw.multiline_text((x, y + cell_px + 1), "\n".join(lines), "black", font=font, spacing=1)
    return sheet


def save_png(sheet: Image.Image, path: Path) -> Path:
    """Write `sheet` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    sheet.save(part, format="PNG")
    part.replace(path)
    return path
