"""Sheets of pictures."""

import pytest
import torch
from PIL import Image

from iomm.evaluation.grid import MARGIN_PX, image_grid, save_png


def test_pictures_stand_row_by_row():
    pictures = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    pictures[4, 0] = 255
    sheet = image_grid(pictures, 3, cell_px=8)
    assert sheet.size == (3 * (8 + MARGIN_PX) + MARGIN_PX, 2 * (8 + MARGIN_PX) + MARGIN_PX)
    step = 8 + MARGIN_PX
    assert sheet.getpixel((MARGIN_PX + step + 4, MARGIN_PX + step + 4)) == (255, 0, 0)
    assert sheet.getpixel((MARGIN_PX + 2 * step + 4, MARGIN_PX + step + 4)) == (255, 255, 255)


def test_one_caption_a_picture():
    with pytest.raises(ValueError, match="5 pictures and 4 captions"):
        image_grid(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), 3, ["x"] * 4)


def test_a_sheet_is_written_whole(tmp_path):
    path = save_png(
        image_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1, ["a red apple"]), tmp_path / "a" / "b.png"
    )
    with Image.open(path) as image:
        image.load()
    assert [p.name for p in path.parent.iterdir()] == ["b.png"]
