import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iomm.data.decode import decode_view
from iomm.data.decode_cpu import CpuDecoder
from iomm.data.view import Box, View
from tests.data.conftest import encode, noise_image, scene

sides = st.integers(1, 300)
places = st.floats(0, 1, exclude_max=True)


@given(width=sides, height=sides, image_width=sides, image_height=sides, x=places, y=places)
def test_a_box_lies_within_the_image(width, height, image_width, image_height, x, y):
    for view in (View(width, height), View(width, height, crop=(x, y))):
        box = view.box(image_width, image_height)
        assert min(box.left_px, box.top_px) >= 0
        assert min(box.width_px, box.height_px) >= 1
        assert box.left_px + box.width_px <= image_width
        assert box.top_px + box.height_px <= image_height


def test_a_crop_has_the_images_own_resolution():
    assert View(8, 4, crop=(0.0, 0.0)).box(20, 10) == Box(0, 0, 8, 4)
    assert View(8, 4, crop=(0.999, 0.999)).box(20, 10) == Box(12, 6, 8, 4)
    assert View(8, 4, crop=(0.5, 0.5)).box(8, 4) == Box(0, 0, 8, 4)


def test_a_crop_of_an_image_that_is_too_small_is_the_largest_part_of_its_shape():
    assert View(8, 8, crop=(0.99, 0.99)).box(6, 20) == Box(0, 14, 6, 6)


def test_every_place_of_a_crop_is_drawn_equally_often():
    lefts = [View(8, 8, crop=(n / 300, 0.0)).box(10, 8).left_px for n in range(300)]
    assert [lefts.count(left) for left in range(3)] == [100, 100, 100]


def test_names_tell_views_apart():
    views = [
        View(8, 4),
        View(4, 8),
        View(8, 4, flip=True),
        View(8, 4, (0.25, 0.5)),
        View(8, 4, (0.5, 0.25), True),
    ]
    assert View(8, 4).name == "8x4"
    assert len({view.name for view in views}) == len(views)


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_a_flipped_crop_is_cut_out_and_mirrored(format_):
    data = encode(noise_image(0, 32) if format_ == "PNG" else scene(0, 32, 32), format_)
    whole_CHW = decode_view(data, View(32, 32))
    view = View(12, 8, crop=(0.5, 0.25), flip=True)
    box = view.box(32, 32)
    rows, columns = slice(box.top_px, box.top_px + 8), slice(box.left_px, box.left_px + 12)
    expected_CHW = whole_CHW[:, rows, columns].flip(-1)
    [fast_CHW] = CpuDecoder().decode([data], [view])
    assert torch.equal(decode_view(data, view), expected_CHW)
    assert isinstance(fast_CHW, torch.Tensor)
    assert fast_CHW.is_contiguous()
    assert torch.equal(fast_CHW, expected_CHW)


def test_each_file_of_a_call_has_its_own_view():
    data = encode(noise_image(1, 16))
    views = [View(8, 8), View(4, 6, flip=True)]
    small_CHW, flipped_CHW = CpuDecoder().decode([data, data], views)
    assert isinstance(small_CHW, torch.Tensor)
    assert isinstance(flipped_CHW, torch.Tensor)
    assert torch.equal(small_CHW, decode_view(data, views[0]))
    assert torch.equal(flipped_CHW, decode_view(data, views[1]))
