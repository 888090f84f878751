import pytest
import torch
from PIL import Image

from iomm.data.decode import decode_view
from iomm.data.decode_cpu import CpuDecoder
from iomm.data.decode_dali import DaliDecoder
from iomm.data.decoder import dali_installed
from iomm.data.errors import BadSample
from iomm.data.view import View
from tests.data.conftest import encode, noise_image, psnr_db, scene

pytestmark = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed: iomm[data]")
SQUARE = View(32, 32)


@pytest.fixture(scope="module")
def dali() -> DaliDecoder:
    return DaliDecoder(None, threads=1)


def photo(seed: int, width_px: int, height_px: int, orientation: int = 1, mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(scene(seed, width_px, height_px).convert(mode), "JPEG", quality=90, exif=exif)


def pixels(results: list[torch.Tensor | BadSample]) -> list[torch.Tensor]:
    good = [result for result in results if isinstance(result, torch.Tensor)]
    assert len(good) == len(results), results
    return good


def test_dali_and_the_cpu_path_agree_on_the_same_crops(dali):
    files = [photo(0, 50, 40), photo(1, 40, 50, 6), photo(2, 45, 45, mode="L"), photo(3, 20, 28)]
    files += [photo(10 + turn, 47, 35, turn) for turn in range(1, 9)]
    views = [SQUARE] * len(files)
    files += files[:6]
    views += [View(32, 32, crop=(0.3, 0.8)), View(24, 32, flip=True), View(16, 24, (0.9, 0.1), True)] * 2
    for got_CHW, want_CHW in zip(
        pixels(dali.decode(files, views)), pixels(CpuDecoder().decode(files, views)), strict=True
    ):
        assert got_CHW.dtype == torch.uint8
        assert got_CHW.is_contiguous()
        assert psnr_db(got_CHW, want_CHW) >= 38
    assert dali.rescued == 0


def test_dali_and_the_cpu_paths_reduced_decode_agree_on_the_same_crops(dali):
    files = [photo(4, 301, 201), photo(5, 133, 131, 8), photo(6, 96, 64)]
    views = [SQUARE] * len(files)
    for got_CHW, want_CHW in zip(
        pixels(dali.decode(files, views)), pixels(CpuDecoder().decode(files, views)), strict=True
    ):
        assert psnr_db(got_CHW, want_CHW) >= 38


def test_a_jpeg_of_the_views_size_keeps_its_pixels(dali):
    data = photo(7, 32, 32)
    [image_CHW] = pixels(dali.decode([data], [SQUARE]))
    assert torch.equal(image_CHW, decode_view(data, SQUARE))


def test_what_dali_does_not_take_is_decoded_by_the_reference_in_its_place(dali):
    others = [encode(noise_image(0, 40)), encode(noise_image(1, 40).convert("CMYK"), "JPEG")]
    files = [others[0], photo(8, 40, 40), others[1]]
    images = pixels(dali.decode(files, [SQUARE] * len(files)))
    assert torch.equal(images[0], decode_view(others[0], SQUARE))
    assert torch.equal(images[2], decode_view(others[1], SQUARE))


def test_pixels_do_not_depend_on_the_other_files_of_a_call(dali):
    files = [photo(20 + n, 40 + 3 * n, 40) for n in range(5)]
    together = pixels(dali.decode(files, [SQUARE] * len(files)))
    for alone, image_CHW in zip(files, together, strict=True):
        assert torch.equal(pixels(dali.decode([alone], [SQUARE]))[0], image_CHW)


def test_a_bad_header_never_reaches_dali(dali):
    good = photo(9, 40, 40)
    results = dali.decode([b"", good, b"<html>", good[:200]], [SQUARE] * 4)
    assert [isinstance(result, BadSample) for result in results] == [True, False, True, True]
    assert dali.rescued == 0


def test_a_file_that_dali_fails_on_costs_only_itself_and_the_next_call_uses_dali_again(caplog):
    decoder = DaliDecoder(None, threads=1)
    good = photo(9, 64, 64)
    torn = good[: len(good) * 2 // 3]
    results = decoder.decode([good, torn, good], [SQUARE] * 3)
    assert [isinstance(result, BadSample) for result in results] == [False, True, False]
    alone = pixels(DaliDecoder(None, threads=1).decode([good], [SQUARE]))[0]
    assert all(torch.equal(pixels([results[n]])[0], alone) for n in (0, 2))  # not the CPU's reduced decode
    assert decoder.rescued == 1
    assert "DALI failed on a call of 3 files" in caplog.text
    pixels(decoder.decode([good, good], [SQUARE] * 2))
    assert decoder.rescued == 1
