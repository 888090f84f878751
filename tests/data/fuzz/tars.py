"""Tar files for the fuzzer, header by header, so that every field can lie."""

import random
from collections.abc import Callable, Sequence

BLOCK = 512
END = bytes(2 * BLOCK)
Named = Sequence[tuple[bytes, bytes]]  # (name, data) of members


def header(
    name: bytes,
    size: int,
    *,
    type_: bytes = b"0",
    link: bytes = b"",
    size_field: bytes | None = None,
    sum_off_by: int = 0,
    prefix: bytes = b"",
) -> bytes:
    """One block. `size_field`: 12 bytes that stand for the size; `sum_off_by`: makes the checksum wrong."""
    field = size_field or b"%011o\0" % size
    raw = bytearray(
        name[:100].ljust(100, b"\0")
        + b"0000644\0" + b"0000000\0" * 2
        + field
        + b"00000000000\0"
        + b" " * 8
        + type_
        + link[:100].ljust(100, b"\0")
        + b"ustar\x0000"
        + bytes(64)
        + b"0000000\0" * 2
        + prefix[:155].ljust(155, b"\0")
        + bytes(12)
    )  # fmt: skip
    assert len(raw) == BLOCK
    raw[148:156] = b"%06o\0 " % (sum(raw) + sum_off_by)
    return bytes(raw)


def padded(data: bytes) -> bytes:
    """Filled with zeros to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes, **fields) -> bytes:
    """A header with its data."""
    return header(name, len(data), **fields) + padded(data)


def tar(members: Named) -> bytes:
    """A sound tar."""
    return b"".join(member(name, data) for name, data in members) + END


def pax(records: bytes, *, type_: bytes = b"x") -> bytes:
    """An extended header of the next member (or of all that follow: `type_` g)."""
    return member(b"PaxHeaders/x", records, type_=type_)


def record(key: bytes, value: bytes) -> bytes:
    """A line of an extended header: its own length comes first."""
    body = b" " + key + b"=" + value + b"\n"
    size = len(body) + 1
    while len(b"%d" % size) + len(body) != size:
        size = len(b"%d" % size) + len(body)
    return b"%d" % size + body


def gnu_long(name: bytes, size: int | None = None) -> bytes:
    """GNU's long name of the next member; `size`: what its header claims."""
    data = name + b"\0"
    return header(b"././@LongLink", len(data) if size is None else size, type_=b"L") + padded(data)


SIZE_FIELDS: dict[str, Callable[[random.Random, int], bytes]] = {
    "more": lambda rng, size: b"%011o\0" % (size + rng.choice((1, 400, 600, 2000, 100_000))),
    "less": lambda rng, size: b"%011o\0" % rng.randrange(size),
    "8 GiB": lambda _rng, _size: b"77777777777\0",
    "negative": lambda _rng, _size: b"\xff" * 12,
    "64 bits": lambda _rng, _size: b"\x80\0\0\0\x7f" + b"\xff" * 7,
    "88 bits": lambda _rng, _size: b"\x80" + b"\xff" * 11,
    "no number": lambda rng, _size: rng.choice(
        (b"not a number", b"-0000000001\0", b"0x000000010\0", b"1e3" * 4)
    ),
    "blank": lambda rng, _size: rng.choice((bytes(12), b" " * 12)),
}

# Names around a token, so that the fuzzer finds the image again.
NAMES: dict[str, Callable[[bytes], bytes]] = {
    "up": lambda t: b"../../" + t + b".png",
    "up at the end": lambda t: t + b"/...png",
    "absolute": lambda t: b"/etc/" + t + b".png",
    "newline": lambda t: t + b"\nsecond line.png",
    "carriage return and escape": lambda t: t + b"\r\x1b[2J\x07.png",
    "not UTF-8": lambda t: t + b"\xff\xfe\x80.png",
    "right to left": lambda t: t + "\u202egnp\u200b\ufeff.png".encode(),
    "backslash": lambda t: b"..\\" + t + b".png",
    "blank": lambda t: b" " + t + b" .png ",
    "dots": lambda t: t + b"....png",
    "upper case": lambda t: t + b".PNG",
    "no suffix": lambda t: t,
    "other suffix": lambda t: t + b".exe",
    "two suffixes": lambda t: t + b".png.txt",
    "folder": lambda t: b"a/b/" + t + b".png",
    "here": lambda t: b"./" + t + b".png",
    "device": lambda t: b"NUL." + t + b".png",
    "slash at the end": lambda t: t + b".png/",
    "quote and brace": lambda t: t + b"'\"{}%s$(x)`.png",
    "address": lambda t: b"s3://" + t + b".png",
    "99 bytes": lambda t: t + b"x" * (95 - len(t)) + b".png",
    "hidden": lambda t: b"." + t + b".png",
}
