import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from iomm.config import MAX_IMAGE_PIXELS
from iomm.data import decode_header
from iomm.data.decode import PillowDecoder, decode_image, decode_view
from iomm.data.decode_cpu import CpuDecoder
from iomm.data.decode_header import probe
from iomm.data.errors import BadSample
from iomm.data.view import Box, View, reduce
from tests.data.conftest import encode, noise_image, psnr_db, scene

SQUARE = View(32, 32)
Decode = Callable[..., torch.Tensor]


@pytest.fixture(params=["rows", "whole"])
def cpu(request: pytest.FixtureRequest) -> CpuDecoder:
    if request.param == "rows":
        request.getfixturevalue("compiled_jpeg")
    return CpuDecoder(way=request.param, max_pixels=MAX_IMAGE_PIXELS)


@pytest.fixture
def decode_cpu(cpu: CpuDecoder) -> Decode:
    def decode(data: bytes, view: View = SQUARE) -> torch.Tensor:
        [image_CHW] = cpu.decode([data], [view])
        assert isinstance(image_CHW, torch.Tensor), image_CHW
        return image_CHW

    return decode


def oriented(image: Image.Image, orientation: int, format_: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format_, exif=exif, **options)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_of_the_views_size_keeps_the_pixels_that_the_reference_decodes(decode_cpu, mode):
    data = encode(scene(0, 32, 32).convert(mode), "JPEG", quality=90)
    assert torch.equal(decode_cpu(data), decode_view(data, SQUARE))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(75, 40), (40, 75)])
def test_a_jpeg_is_cropped_turned_and_resized_as_the_reference_does(decode_cpu, orientation, size):
    data = oriented(scene(1, *size), orientation, quality=90)
    got_CHW, want_CHW = decode_cpu(data), decode_view(data, SQUARE)
    assert got_CHW.dtype == torch.uint8
    assert got_CHW.is_contiguous()
    assert (got_CHW.int() - want_CHW.int()).abs().max() <= 2


def test_views_of_other_shapes_are_cut_from_the_upright_image(decode_cpu):
    data = oriented(scene(2, 80, 60), 6, quality=90)
    view = View(24, 40)
    got_CHW = decode_cpu(data, view)
    assert got_CHW.shape == (3, 40, 24)
    assert psnr_db(got_CHW, decode_view(data, view)) >= 45


def test_a_small_jpeg_is_enlarged_as_the_reference_does(decode_cpu):
    data = encode(scene(3, 20, 20), "JPEG", quality=90)
    assert (decode_cpu(data).int() - decode_view(data, SQUARE).int()).abs().max() <= 2


@pytest.mark.parametrize("times", [2, 5, 9])
def test_a_jpeg_decoded_at_reduced_size_stays_near_the_reference(decode_cpu, times):
    data = encode(scene(4, 48 * times, 32 * times), "JPEG", quality=90)
    assert psnr_db(decode_cpu(data), decode_view(data, SQUARE)) >= 38


def test_the_reduced_decode_is_the_full_ones_crop_even_when_edges_are_odd(decode_cpu):
    for size in ((99, 66), (101, 67), (131, 131)):
        for orientation in (1, 3, 6):
            data = oriented(scene(5, *size, detail=0.1), orientation, quality=95)
            assert psnr_db(decode_cpu(data), decode_view(data, SQUARE)) >= 28  # up to a pixel aside


@pytest.mark.parametrize(
    "data",
    [
        encode(noise_image(0, 40)),
        encode(noise_image(0, 40), "WEBP"),
        encode(noise_image(0, 40).convert("CMYK"), "JPEG"),
        encode(Image.new("RGBA", (40, 40), (255, 0, 0, 51))),
    ],
    ids=["png", "webp", "cmyk", "transparent"],
)
def test_what_is_no_plain_jpeg_is_decoded_by_the_reference(decode_cpu, data):
    assert torch.equal(decode_cpu(data), decode_view(data, SQUARE))


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.97])
def test_a_truncated_jpeg_is_a_bad_sample_and_the_others_are_decoded(cpu, kept):
    good = encode(scene(6, 64, 64), "JPEG")
    results = cpu.decode([good, good[: int(len(good) * kept)], good], [SQUARE] * 3)
    assert [isinstance(result, BadSample) for result in results] == [False, True, False]


def test_invented_pixels_of_a_damaged_jpeg_are_refused_where_pillow_takes_them(cpu):
    good = encode(scene(7, 64, 64), "JPEG", quality=90)
    scan = good.index(b"\xff\xda")
    refused = taken = 0
    for at in range(scan + 40, len(good) - 2, max(1, (len(good) - scan) // 40)):
        damaged = good[:at] + b"\xff\xd0" + good[at + 2 :]  # a restart marker out of place
        [strict], [lax] = (
            cpu.decode([damaged], [SQUARE]),
            PillowDecoder().decode([damaged], [SQUARE]),
        )
        refused += isinstance(strict, BadSample)
        taken += isinstance(lax, torch.Tensor)
    assert refused >= 30
    assert taken >= 30


def test_flipped_bytes_never_raise_anything(cpu):
    rng = np.random.default_rng(8)
    good = oriented(scene(8, 40, 24), 6, quality=90)
    for _ in range(80):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        [result] = CpuDecoder(max_pixels=10_000).decode([bytes(data)], [SQUARE])
        assert isinstance(result, BadSample) or result.shape == (3, 32, 32)


def test_a_jpeg_that_promises_too_many_pixels_is_refused_by_its_header(cpu):
    data = encode(scene(9, 16, 16), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    huge = data[:at] + struct.pack(">HH", 60_000, 50_000) + data[at + 4 :]
    [result] = cpu.decode([huge], [SQUARE])
    assert isinstance(result, BadSample)
    assert result.reason == "50000 x 60000 px in the header, more than the limit of 100000000 px"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_the_header_tells_the_upright_size(orientation, format_):
    header = probe(oriented(scene(10, 12, 8), orientation, format_))
    assert (header.format, header.orientation) == (format_.lower(), orientation)
    assert header.upright_size_px == ((12, 8) if orientation < 5 else (8, 12))


def test_the_header_of_a_png_finds_an_orientation_behind_the_pixels():
    png = oriented(scene(11, 12, 8), 6, "PNG")
    at = png.index(b"eXIf") - 4
    size = 12 + struct.unpack_from(">I", png, at)[0]
    end = png.index(b"IEND") - 4
    moved = png[:at] + png[at + size : end] + png[at : at + size] + png[end:]
    assert probe(moved).upright_size_px == (8, 12)
    assert decode_image(moved, 8).shape == (3, 8, 8)


def test_the_header_is_read_without_decoding_pixels():
    good = encode(scene(12, 64, 48), "JPEG")
    assert probe(good[: good.index(b"\xff\xda") + 20]).upright_size_px == (64, 48)


def test_an_orientation_that_does_not_exist_is_taken_for_upright():
    assert probe(oriented(scene(13, 12, 8), 77)).orientation == 1


def test_a_foreign_colour_profile_is_said_once(caplog):
    decode_header.say_profiles_ignored.cache_clear()
    for profile in (b"something sRGB IEC61966-2.1", b"Display P3", b"Adobe RGB"):
        probe(encode(scene(14, 8, 8), "JPEG", icc_profile=profile))
    assert [record.message[:34] for record in caplog.records] == ["an image has a colour profile that"]


def test_the_centre_of_the_views_shape_is_shown_as_large_as_fits():
    assert View(8, 8).box(10, 7) == Box(1, 0, 7, 7)
    assert View(8, 8).box(7, 10) == Box(0, 1, 7, 7)
    assert View(16, 8).box(100, 100) == Box(0, 25, 100, 50)
    assert View(8, 8).box(8, 8) == Box(0, 0, 8, 8)
    assert View(64, 8).box(3, 100) == Box(0, 49, 3, 1)


def test_a_reduction_leaves_at_least_the_wanted_size():
    assert reduce(Box(401, 1, 1600, 1599), 512, 512) == (2, Box(400, 0, 1600, 1598))
    assert reduce(Box(0, 0, 4096, 4100), 512, 512) == (8, Box(0, 0, 4096, 4096))
    assert reduce(Box(3, 5, 1023, 2000), 512, 512) == (1, Box(3, 5, 1023, 2000))


def test_a_view_without_pixels_is_refused():
    with pytest.raises(ValueError, match="a view of 0 x 8 px"):
        View(0, 8)
