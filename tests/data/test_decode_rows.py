"""What only the row-streaming decoder can get wrong: parts, rows in flight, and the library beneath it."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from iomm.data.decode import decode_view
from iomm.data.decode_cpu import CpuDecoder, jpeg_way
from iomm.data.errors import BadSample
from iomm.data.view import View
from iomm_kernels import jpeg
from tests.data.conftest import encode, noise_image, scene

KINDS = [
    {"subsampling": subsampling, "progressive": progressive, **restarts}
    for subsampling, progressive, restarts in itertools.product(
        (0, 1, 2), (False, True), ({}, {"restart_marker_blocks": 3})
    )
]


@pytest.fixture
def rows(compiled_jpeg: None) -> CpuDecoder:
    return CpuDecoder(way="rows")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_part_of_any_kind_of_jpeg_has_the_references_pixels(rows, kind):
    rng = np.random.default_rng(0)
    data = encode(scene(0, 83, 61), "JPEG", quality=85, **kind)
    for _ in range(12):
        crop = (float(rng.random()), float(rng.random()))
        view = View(int(rng.integers(1, 60)), int(rng.integers(1, 60)), crop, bool(rng.integers(2)))
        [image_CHW] = rows.decode([data], [view])
        assert torch.equal(image_CHW, decode_view(data, view))  # at native resolution: nothing is resized


@pytest.mark.parametrize("size", [(3, 2), (7, 40), (33, 21), (61, 59), (90, 31)])
def test_sizes_that_fill_no_vector_are_resized_as_the_reference_does(rows, size):
    for data in (encode(noise_image(1, 90).crop((0, 0, *size)), "JPEG"), encode(scene(2, 90, 90), "JPEG")):
        for view in (View(1, 1), View(17, 5), View(5, 17), View(64, 63), View(91, 90, flip=True)):
            [got_CHW], [want_CHW] = (cpu.decode([data], [view]) for cpu in (rows, CpuDecoder(way="whole")))
            assert isinstance(got_CHW, torch.Tensor)
            assert isinstance(want_CHW, torch.Tensor)
            assert (got_CHW.int() - want_CHW.int()).abs().max() <= 2


def test_a_strip_far_longer_than_wide_needs_no_more_rows_than_its_filter(rows):
    data = encode(scene(3, 40, 2000), "JPEG", quality=85)
    view = View(2, 100)  # 1/8 in decoding, then 2.5 times smaller
    assert (rows.decode([data], [view])[0].int() - decode_view(data, view).int()).abs().max() <= 30


def test_threads_decode_side_by_side_what_one_decodes(rows):
    files = [encode(scene(seed, 70, 50), "JPEG") for seed in range(8)] * 4
    files[5] = files[5][:300]
    alone = [rows.decode([data], [View(32, 32)])[0] for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: rows.decode([data], [View(32, 32)])[0], files))
    assert isinstance(alone[5], BadSample)
    assert [str(a) for a in alone] == [str(b) for b in together]
    assert all(
        torch.equal(a, b) for a, b in zip(alone, together, strict=True) if not isinstance(a, BadSample)
    )


def test_damage_below_the_part_that_is_shown_is_found_too(rows):
    good = encode(noise_image(4, 96), "JPEG", quality=95)
    top = View(96, 8, (0.0, 0.0))
    assert isinstance(rows.decode([good], [top])[0], torch.Tensor)
    for damaged in (good[:-2], good[:-200], good[:-400] + b"\xff\xd0" + good[-398:]):
        [result] = rows.decode([damaged], [top])
        assert isinstance(result, BadSample)
        assert result.reason.startswith("cannot be decoded: ")


def cut(**changes: int) -> jpeg.Cut:
    whole = {"width": 8, "height": 8, "reduce": 1, "left": 0, "top": 0, "columns": 8, "rows": 8}
    return jpeg.Cut(
        **(whole | {"out_width": 8, "out_height": 8} | changes), mirrored=False, upside_down=False
    )


def refusal(data: bytes, part: jpeg.Cut) -> str | None:
    return jpeg.view(data, part, np.empty((3, part.out_height, part.out_width), np.uint8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 9}, "its size is not the one that its header was read to say"),
        ({"left": 1}, "the part lies outside the image"),
        ({"rows": 9}, "the part lies outside the image"),
        ({"reduce": 2}, "the part lies outside the image"),
    ],
)
@pytest.mark.usefixtures("compiled_jpeg")
def test_a_part_that_the_file_does_not_have_is_refused(changes, reason):
    assert refusal(encode(noise_image(5, 8), "JPEG"), cut(**changes)) == reason


@pytest.mark.usefixtures("compiled_jpeg")
def test_four_components_and_endless_scans_are_refused():
    four = encode(noise_image(6, 8).convert("CMYK"), "JPEG")
    assert refusal(four, cut()) == "neither gray nor of three components"
    data = encode(noise_image(6, 8), "JPEG", progressive=True)
    begin = data.index(b"\xff\xda\x00\x08\x01\x02")  # of Cb, all frequencies but 0, without the last bit
    end = data.index(b"\xff\xc4", begin)  # the next scan's tables
    scan = data[begin : begin + 9] + b"\x00" + data[begin + 10 : end]  # with it: such a scan may come again
    assert refusal(data[:begin] + scan * 110 + data[end:], cut()) == "more than 100 scans"


def test_a_decoder_that_was_asked_for_and_not_built_is_an_error(monkeypatch):
    monkeypatch.setattr(jpeg, "problem", lambda: "is not built")
    with pytest.raises(ValueError, match="JPEGs cannot be decoded row by row: the library is not built"):
        CpuDecoder(way="rows")
    assert jpeg_way() == "JPEGs by simplejpeg and torch; the faster library is not built"
