"""Image files for the fuzzer: sound ones of every variety, and damage done to their bytes."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

from tests.data.conftest import encode, noise_image

MAX_PIXELS = 4_000_000  # the limit that trials run with, so that an input just below it costs little
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of PNG's colour types
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@functools.cache
def variants() -> dict[str, bytes]:
    """Sound image files by name; all of them have to be used."""
    rgb = noise_image(1, 40).resize((44, 36), Image.Resampling.BICUBIC)
    alpha = Image.merge("RGBA", (*rgb.split(), rgb.getchannel(1)))
    gray16 = Image.fromarray(_gray16())
    frames = [noise_image(seed, 24) for seed in (2, 3, 4)]
    several = {"save_all": True, "append_images": frames[1:], "duration": 50}
    found = {
        "jpeg": encode(rgb, "JPEG", quality=90),
        "jpeg 4:4:4": encode(rgb, "JPEG", quality=70, subsampling=0),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg gray": encode(rgb.convert("L"), "JPEG"),
        "jpeg CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg restarts": encode(rgb, "JPEG", restart_marker_blocks=1),
        "jpeg profile": encode(rgb, "JPEG", icc_profile=b"no profile at all" * 9),
        "jpeg tail": encode(rgb, "JPEG") + b"what some cameras add" * 40,
        "jpeg one pixel": encode(noise_image(5, 1), "JPEG"),
        "jpeg strip": encode(rgb.resize((600, 2)), "JPEG"),
        "png": encode(rgb),
        "png alpha": encode(alpha),
        "png gray alpha": encode(alpha.convert("LA")),
        "png palette": encode(rgb.quantize(17)),
        "png palette alpha": encode(rgb.quantize(17), transparency=bytes(range(17))),
        "png 1 bit": encode(rgb.convert("1")),
        "png 16 bit": encode(gray16),
        "png 16 bit RGB": png(9, 7, 16, 2),
        "png 16 bit RGBA": png(9, 7, 16, 6),
        "png interlaced": png(19, 13, 8, 2, interlaced=True),
        "png animated": encode(frames[0], **several),
        "png tail": encode(rgb) + bytes(100),
        "webp": encode(rgb, "WEBP", quality=80),
        "webp lossless": encode(rgb, "WEBP", lossless=True),
        "webp alpha": encode(alpha, "WEBP"),
        "webp animated": encode(frames[0], "WEBP", **several),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"jpeg turned {orientation}"] = encode(rgb, "JPEG", exif=exif)
    return found


def _gray16():
    import numpy as np

    return np.random.default_rng(6).integers(0, 1 << 16, (20, 30), dtype=np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, bits: int, colour: int, *, interlaced: bool = False, extra: bytes = b""
) -> bytes:
    """A black PNG of any depth and colour type; `extra`: chunks before the pixels."""

    def rows(w: int, h: int) -> bytes:
        return (b"\0" * (1 + (w * bits * _CHANNELS[colour] + 7) // 8)) * h if w and h else b""

    passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _ADAM7]
    raw = b"".join(rows(w, h) for w, h in passes) if interlaced else rows(width, height)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    pixels = chunk(b"IDAT", zlib.compress(raw, 1))
    return _PNG_SIGNATURE + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


@functools.cache
def strangers() -> dict[str, bytes]:
    """Files of other formats; none can be used."""
    picture = noise_image(7, 20)
    return {
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(3000),
        "html": b"<!DOCTYPE html><title>404</title>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "gif": encode(picture, "GIF"),
        "tiff": encode(picture, "TIFF"),
        "bmp": encode(picture, "BMP"),
        "avif": b"\0\0\0\x20ftypavif" + bytes(200),
        "jpeg's first bytes": b"\xff\xd8\xff",
        "png's first bytes": _PNG_SIGNATURE,
        "webp's first bytes": b"RIFF\xff\xff\xff\xffWEBP",
        "pickle": b"cos\nsystem\n(S'false'\ntR.",
    }


def heavy(rng: random.Random) -> tuple[str, bytes]:
    """A small file that asks for much: memory, pixels, text, or time."""
    makers: dict[str, Callable[[], bytes]] = {
        "many pixels": lambda: png(9000, 8000, 1, 0),
        "pixels at the limit": lambda: png(2000, MAX_PIXELS // 2000, 8, 6),
        "a text of 60 MB": lambda: png(9, 9, 8, 2, extra=chunk(b"zTXt", b"a\0\0" + _zeros(60))),
        "a profile of 60 MB": lambda: png(9, 9, 8, 2, extra=chunk(b"iCCP", b"a\0\0" + _zeros(60))),
        "pixels of 60 MB in a small image": lambda: _overfull(60),
        "a chunk of 2 GB that is not there": lambda: _claim(png(9, 9, 8, 2), 0x7FFFFFFF),
        "a thousand scans": lambda: scans(1000),
    }
    what = rng.choice(list(makers))
    return what, makers[what]()


@functools.cache
def _zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def _overfull(megabytes: int) -> bytes:
    header = struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)
    return _PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", _zeros(megabytes)) + chunk(b"IEND", b"")


def _claim(data: bytes, size: int) -> bytes:
    at = data.index(b"IDAT") - 4
    return data[:at] + struct.pack(">I", size) + data[at + 4 :]


@functools.cache
def scans(count: int) -> bytes:
    """A progressive JPEG of 1600 x 1600 whose last scan comes `count` times, each over all blocks."""
    data = encode(Image.new("RGB", (1600, 1600)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def _at(rng: random.Random, data: bytes) -> int:
    """A place in a file, half of the time in its first 200 bytes, where the headers are."""
    return rng.randrange(max(1, min(len(data), 200) if rng.random() < 0.5 else len(data)))


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """Up to 16 bits turned."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        damaged[_at(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A run of zeros, of ones or of noise over what was there."""
    start = _at(rng, data)
    size = min(rng.choice((1, 4, 64, 512)), len(data) - start)
    run = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return data[:start] + run + data[start + size :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    """The end is missing: anything from one byte to all."""
    return data[: rng.choice((len(data) - 1, len(data) - 2, _at(rng, data), rng.randrange(len(data))))]


def cut_out(rng: random.Random, data: bytes) -> bytes:
    """A piece of the middle is missing."""
    start = _at(rng, data)
    return data[:start] + data[start + rng.choice((1, 2, 16, 300)) :]


def put_in(rng: random.Random, data: bytes) -> bytes:
    """Noise, or a piece of the file itself, where it does not belong."""
    start, other = _at(rng, data), _at(rng, data)
    piece = rng.choice((rng.randbytes(rng.choice((1, 2, 100))), data[other : other + 200]))
    return data[:start] + piece + data[start:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """The beginning of the file, and the end of another."""
    other = rng.choice(list(variants().values()))
    return data[: _at(rng, data)] + other[_at(rng, other) :]


def extreme_number(rng: random.Random, data: bytes) -> bytes:
    """Two or four bytes anywhere in the headers become an extreme number: a length, a size, an offset."""
    start = rng.randrange(min(len(data), 400))
    number = rng.choice(
        (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff", b"\0\0", b"\0\1")
    )
    return data[:start] + number + data[start + len(number) :]


def lie_about_size(rng: random.Random, data: bytes) -> bytes:
    """Another width and height in the header, its checksum made right."""
    sides = (0, 1, 2, 3, 500, 16_383, 65_500, 65_535, (1 << 31) - 1, (1 << 32) - 1)
    width, height = rng.choice(sides), rng.choice(sides)
    if data.startswith(_PNG_SIGNATURE):
        return data[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]
    if data.startswith(b"\xff\xd8"):
        at = next(n for n in range(2, len(data)) if data[n] == 0xFF and data[n + 1] in (0xC0, 0xC1, 0xC2))
        return data[: at + 5] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + data[at + 9 :]
    if data[12:16] == b"VP8X":
        size = struct.pack("<I", width & 0xFFFFFF)[:3] + struct.pack("<I", height & 0xFFFFFF)[:3]
        return data[:24] + size + data[30:]
    return data[:26] + struct.pack("<HH", width & 0x3FFF, height & 0x3FFF) + data[30:]


DAMAGE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bits flipped": flip_bits,
    "overwritten": overwrite,
    "truncated": truncate,
    "piece cut out": cut_out,
    "piece put in": put_in,
    "spliced": splice,
    "extreme number": extreme_number,
    "false size": lie_about_size,
}


def small(rng: random.Random, count: int) -> list[bytes]:
    """Sound little PNGs, all different."""
    return [_small(seed) for seed in rng.sample(range(64), count)]


@functools.cache
def _small(seed: int) -> bytes:
    return encode(noise_image(1000 + seed, 12))


def suffix_of(data: bytes) -> str:
    """The suffix that a file's first bytes ask for; png where they say nothing."""
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    return "webp" if data[8:12] == b"WEBP" else "png"


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    """A Parquet file of rows."""
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()
