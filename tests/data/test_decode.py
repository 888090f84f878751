import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from iomm.data.decode import decode_image
from iomm.data.errors import BadSample
from tests.data.conftest import encode, noise_image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def flat(image_CHW: torch.Tensor) -> list[int]:
    """The colour of an image that has only one."""
    assert torch.equal(image_CHW, image_CHW[:, :1, :1].expand_as(image_CHW))
    return image_CHW[:, 0, 0].tolist()


@pytest.mark.parametrize(("format_", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_image_of_the_right_side_keeps_its_pixels(format_, options):
    image = noise_image(0, 16)
    decoded_CHW = decode_image(encode(image, format_, **options), 16)
    assert decoded_CHW.dtype == torch.uint8
    assert decoded_CHW.is_contiguous()
    np.testing.assert_array_equal(decoded_CHW.permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_jpeg_decodes_to_nearly_its_colour():
    colour = torch.tensor(flat(decode_image(encode(Image.new("RGB", (16, 16), (200, 100, 50)), "JPEG"), 16)))
    assert (colour - torch.tensor([200, 100, 50])).abs().max() <= 2


def test_a_wide_image_is_cut_to_its_centre_square():
    pixels_HWC = np.zeros((4, 10, 3), np.uint8)
    pixels_HWC[:, 3:7] = 255
    assert flat(decode_image(encode(Image.fromarray(pixels_HWC)), 4)) == [255, 255, 255]


def test_downscaling_is_antialiased():
    stripes_HW = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small_CHW = decode_image(encode(Image.fromarray(stripes_HW)), 8).int()
    assert (small_CHW[:, 1:-1, 1:-1] - 127).abs().max() <= 3


def test_a_small_image_is_enlarged():
    assert decode_image(encode(noise_image(1, 3)), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_exif_orientation_turns_the_image_upright(orientation, format_):
    upright_HWC = np.asarray(noise_image(2, 4))
    stored_HWC = {
        1: upright_HWC,
        2: upright_HWC[:, ::-1],
        3: upright_HWC[::-1, ::-1],
        4: upright_HWC[::-1],
        5: upright_HWC.transpose(1, 0, 2),
        6: np.rot90(upright_HWC, 1),
        7: upright_HWC[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright_HWC, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored_HWC)), format_, exif=exif, **options)
    np.testing.assert_array_equal(decode_image(data, 4).permute(1, 2, 0).numpy(), upright_HWC)


def test_transparency_is_laid_on_white():
    assert flat(decode_image(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), 4)) == [255, 255, 255]
    assert flat(decode_image(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 51))), 4)) == [255, 204, 204]
    assert flat(decode_image(encode(Image.new("LA", (4, 4), (0, 0))), 4)) == [255, 255, 255]


def test_a_palette_keeps_its_colours_and_its_transparent_entry_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    assert flat(decode_image(encode(image), 4)) == [10, 200, 30]
    assert flat(decode_image(encode(image, transparency=1), 4)) == [255, 255, 255]
    assert flat(decode_image(encode(image, transparency=bytes([255, 0])), 4)) == [255, 255, 255]


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    levels_HW = np.array([[0, 400, 32_768, 65_535]] * 4, np.uint16)
    decoded_CHW = decode_image(encode(Image.fromarray(levels_HW)), 4)
    assert decoded_CHW[0, 0].tolist() == [0, 2, 128, 255]
    assert torch.equal(decoded_CHW[0], decoded_CHW[2])


def test_gray_and_one_bit_images_become_rgb():
    assert flat(decode_image(encode(Image.new("L", (4, 4), 77)), 4)) == [77, 77, 77]
    assert flat(decode_image(encode(Image.new("1", (4, 4), 1)), 4)) == [255, 255, 255]


def test_cmyk_becomes_rgb():
    red, green, blue = flat(decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8))
    assert red >= 250
    assert max(green, blue) <= 5


def test_an_animation_gives_its_first_frame():
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    data = encode(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert flat(decode_image(data, 4)) == [255, 0, 0]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.95])
def test_a_truncated_file_is_a_bad_sample(format_, kept):
    data = encode(noise_image(3, 64), format_)
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(data[: int(len(data) * kept)], 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0" * 4096, "starts with 00 00 00"),
        (b"<html>not found</html>", "not a JPEG, PNG or WebP file"),
        (b"\xff\xd8\xff" + b"\x55" * 500, "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\x55" * 500, "cannot be decoded"),
        (b"RIFF\0\0\0\0WEBP" + b"\x55" * 500, "cannot be decoded"),
    ],
)
def test_a_file_of_other_bytes_is_a_bad_sample_that_says_what_it_is(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode_image(data, 8)


def test_other_formats_are_bad_samples():
    with pytest.raises(BadSample, match="not a JPEG, PNG or WebP file: starts with 47 49 46"):
        decode_image(encode(Image.new("P", (4, 4)), "GIF"), 4)


def test_damaged_bytes_within_a_file_never_raise_anything_but_bad_sample():
    rng = np.random.default_rng(4)
    for format_ in ("JPEG", "PNG", "WEBP"):
        good = encode(noise_image(5, 16), format_)
        for _ in range(60):
            data = bytearray(good)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(0, 256)
            try:
                decoded_CHW = decode_image(bytes(data), 8, max_pixels=10_000)
            except BadSample:
                continue
            assert decoded_CHW.shape == (3, 8, 8)


def test_a_huge_header_is_refused_before_any_pixel_is_decoded():
    with pytest.raises(
        BadSample, match="50000 x 50000 px in the header, more than the limit of 100000000 px"
    ):
        decode_image(huge_png(50_000, 50_000), 8)


def test_the_pixel_limit_is_a_setting_and_inclusive():
    data = encode(noise_image(6, 8))
    assert decode_image(data, 8, max_pixels=64).shape == (3, 8, 8)
    with pytest.raises(BadSample, match="8 x 8 px"):
        decode_image(data, 8, max_pixels=63)


def test_decoding_does_not_change_pillows_settings_for_the_process():
    before = Image.MAX_IMAGE_PIXELS
    decode_image(encode(noise_image(7)), 8)
    assert before == Image.MAX_IMAGE_PIXELS
    assert Image.open(io.BytesIO(encode(noise_image(7)))).size == (8, 8)
