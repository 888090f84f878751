"""Cases of tars that are torn, lie about themselves, or hold what no shard should."""

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from dataclasses import replace

from tests.data.fuzz import images, tars
from tests.data.fuzz.cases import Case, Draft, Put
from tests.data.fuzz.tars import END, gnu_long, header, member, padded, pax, record


def _parts(draft: Draft) -> tuple[Put, Put, Put, bytes, bytes]:
    """Two sound images with their bytes in a tar, and one to go between them."""
    first, subject, last = draft.good(3)
    before, after = (b"".join(member(*m) for m in put.members) for put in (first, last))
    return first, replace(subject, token="subject", caption=None), last, before, after


def _case(draft: Draft, what: str, puts: list[Put], data: bytes, *, swallows: bool = False) -> Case:
    shard = draft.write("set.tar", data)
    return Case(what=what, puts=puts, shard=shard, source=shard, swallows=swallows)


def damaged(draft: Draft) -> Case:
    """Damage anywhere in the file."""
    puts = draft.good(3)
    what = draft.rng.choice(
        ("bits flipped", "overwritten", "truncated", "piece cut out", "piece put in", "extreme number")
    )
    data = images.DAMAGE[what](draft.rng, tars.tar([m for put in puts for m in put.members]))
    return _case(draft, what, puts, data)


def size_field(draft: Draft) -> Case:
    """A header with a wrong size and a right checksum."""
    puts = draft.good(3)
    members = [m for put in puts for m in put.members]
    lying = draft.rng.randrange(len(members))
    what = draft.rng.choice(list(tars.SIZE_FIELDS))
    data = b""
    for n, (name, content) in enumerate(members):
        field = tars.SIZE_FIELDS[what](draft.rng, len(content)) if n == lying else None
        data += header(name, len(content), size_field=field) + padded(content)
    return _case(draft, f"{what} in header {lying}", puts, data + END, swallows=what == "more")


def checksum(draft: Draft) -> Case:
    """A header with a wrong checksum."""
    first, subject, last, before, after = _parts(draft)
    off = draft.rng.choice((1, -1, 256))
    broken = member(b"subject.png", subject.image, sum_off_by=off)
    return _case(draft, f"off by {off}", [first, subject, last], before + broken + after + END)


def name(draft: Draft) -> Case:
    """A member with a strange name."""
    first, subject, last, before, after = _parts(draft)
    what = draft.rng.choice(list(tars.NAMES))
    strange = tars.NAMES[what](b"subject")
    subject = replace(subject, silent=what in ("hidden", "backslash", "up at the end"))
    return _case(draft, what, [first, subject, last], before + member(strange, subject.image) + after + END)


def type_(draft: Draft) -> Case:
    """A link, a device, a folder or an unknown type, under an image's name."""
    first, subject, last, before, after = _parts(draft)
    kind = draft.rng.choice([bytes([n]) for n in b"\x001234567gxLKSVMNDXZa\xff"])
    link = draft.rng.choice((b"/etc/passwd", b"../../../etc/passwd", b"goodA.png", b"subject.png"))
    data = subject.image if draft.rng.random() < 0.6 else b""
    odd = member(b"subject.png", data, type_=kind, link=link)
    subject = replace(subject, silent=kind in b"5gxLK")
    return _case(
        draft, f"type {kind!r}", [first, subject, last], before + odd + after + END, swallows=kind in b"LKgxX"
    )


def nested(draft: Draft) -> Case:
    """A tar in a tar."""
    first, subject, last, before, after = _parts(draft)
    inner = tars.tar([(b"inner.png", subject.image), (b"inner.txt", b"text")])
    for _ in range(draft.rng.choice((0, 0, 5))):
        inner = tars.tar([(b"inner.tar", inner)])
    suffix = draft.rng.choice((b".tar", b".png", b".jpg", b".tar.index"))
    data = before + member(b"subject" + suffix, inner) + after + END
    return _case(draft, f"as {suffix.decode()}", [first, replace(subject, image=inner), last], data)


def duplicates(draft: Draft) -> Case:
    """One key, or one name, or one image twice."""
    first, subject, last, before, after = _parts(draft)
    other = Put("subject", images.variants()["png"])
    jpeg = replace(other, image=images.variants()["jpeg"])
    name = b"subject.png"
    sound = member(name, subject.image)
    cases: dict[str, tuple[list[Put], bytes]] = {
        "a name side by side": ([other], sound + member(name, other.image) + after),
        "a name later": ([other], sound + after + member(name, other.image)),
        "a key later": ([jpeg], sound + after + member(b"subject.jpg", jpeg.image)),
        "two images of a key": ([jpeg], sound + member(b"subject.jpg", jpeg.image) + after),
        "two captions of a key": ([], sound + (member(b"subject.txt", b"one") * 2) + after),
        "a caption later": ([], sound + after + member(b"subject.txt", b"late")),
        "capitals": (
            [replace(other, token="SUBJECT")],
            sound + member(b"SUBJECT.png", other.image) + after,
        ),
        "the same image": (
            [replace(subject, token="copy")],
            sound + member(b"copy.png", subject.image) + after,
        ),
    }
    what = draft.rng.choice(list(cases))
    more, data = cases[what]
    return _case(draft, what, [first, subject, last, *more], before + data + END)


def missing(draft: Draft) -> Case:
    """Members that should be there are not."""
    first, subject, last, before, after = _parts(draft)
    lone = member(b"subject.txt", b"a caption without an image")
    cases: dict[str, tuple[list[Put], bytes]] = {
        "the image": ([first, replace(subject, image=b""), last], before + lone + after),
        "all images": ([replace(subject, image=b"")], lone),
        "everything": ([], b""),
        "all but a folder": ([], header(b"photos/", 0, type_=b"5")),
        "the bytes of the image": (
            [first, replace(subject, image=b""), last],
            before + member(b"subject.png", b"") + after,
        ),
    }
    what = draft.rng.choice(list(cases))
    puts, data = cases[what]
    return _case(draft, what, puts, data + END)


_PAX: dict[str, Callable[[bytes], bytes]] = {
    "path up": lambda t: record(b"path", b"../../" + t + b".png"),
    "path not UTF-8": lambda t: record(b"path", t + b"\xff.png"),
    "path with NUL": lambda t: record(b"path", t + b"\0.png"),
    "path of 70,000": lambda t: record(b"path", t + b"x" * 70_000 + b".png"),
    "size more": lambda _t: record(b"size", b"3000"),
    "size less": lambda _t: record(b"size", b"7"),
    "size negative": lambda _t: record(b"size", b"-1"),
    "size huge": lambda _t: record(b"size", b"9" * 40),
    "size of 5,000 digits": lambda _t: record(b"size", b"9" * 5_000),
    "size no number": lambda _t: record(b"size", b"nan"),
    "time no number": lambda _t: record(b"mtime", b"1e400") + record(b"uid", b"x"),
    "binary": lambda t: record(b"hdrcharset", b"BINARY") + record(b"path", t + b"\xff.png"),
    "unknown charset": lambda t: record(b"hdrcharset", b"EBCDIC") + record(b"path", t + b".png"),
    "sparse": lambda _t: record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"),
    "sparse 0.1": lambda _t: record(b"GNU.sparse.map", b"0,10,x") + record(b"GNU.sparse.size", b"9"),
    "sparse 0.0": lambda _t: record(b"GNU.sparse.offset", b"a") + record(b"GNU.sparse.numbytes", b"b"),
    "length too large": lambda _t: b"9999 path=a\n",
    "length huge": lambda _t: b"9" * 30 + b" path=a\n",
    "length zero": lambda _t: b"0 path=a\n",
    "no line end": lambda _t: b"12 path=abcdef",
    "no equals sign": lambda _t: b"11 abcdefg\n",
    "empty": lambda _t: b"",
    "zeros": lambda _t: bytes(600),
    "2 MB": lambda t: record(b"comment", t * 300_000),
}


def extended(draft: Draft) -> Case:
    """An extended header or a long name that lies, or a long chain of them."""
    first, subject, last, before, after = _parts(draft)
    plain = member(b"subject.png", subject.image)
    long = b"subject" + b"x" * 300 + b".png"
    cases: dict[str, bytes] = {what: pax(make(b"subject")) + plain for what, make in _PAX.items()}
    cases |= {
        "for all that follow": pax(record(b"path", b"all.png"), type_=b"g") + plain,
        "size for all": pax(record(b"size", b"1"), type_=b"g") + plain,
        "nothing after": pax(record(b"path", b"subject.png")),
        "two in a row": pax(record(b"path", b"x.png")) + pax(record(b"comment", b"y")) + plain,
        "a chain": pax(record(b"comment", b"y")) * 1500 + plain,
        "a chain of long names": gnu_long(b"z.png") * 1500 + plain,
        "a long name": gnu_long(long) + plain,
        "a long name of 8 GiB": gnu_long(long, (1 << 33) - 1) + plain,
        "a long name cut short": gnu_long(long, 3) + plain,
        "a long name of nothing": gnu_long(long),
        "a long name of 70,000": gnu_long(b"subject" + b"x" * 70_000 + b".png") + plain,
        "a long name up": gnu_long(b"../" * 60 + b"subject.png") + plain,
    }
    what = draft.rng.choice(list(cases))
    data = (before + cases[what] if draft.rng.random() < 0.7 else cases[what] + before) + after + END
    # Renamed or resized, its bytes cannot be told from what the header says they are.
    swallows = what in (
        "length too large",
        "no line end",
        "size more",
        "size for all",
        "for all that follow",
        "nothing after",
        "a chain of long names",
        "a long name of nothing",
        "a long name cut short",
    )
    return _case(draft, what, [first, subject, last], data, swallows=swallows)


def packed(draft: Draft) -> Case:
    """No plain tar at all."""
    puts = draft.good(2)
    plain = tars.tar([m for put in puts for m in put.members])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for put in puts:
            file.writestr(f"{put.token}.png", put.image)
    cases = {
        "gzip": gzip.compress(plain, mtime=0),
        "bzip2": bz2.compress(plain),
        "xz": lzma.compress(plain),
        "zip": archive.getvalue(),
        "empty": b"",
        "one block of zeros": bytes(512),
        "zeros": bytes(10_240),
        "text": b"not a tar\n" * 300,
        "noise": draft.rng.randbytes(5000),
        "an image": images.variants()["jpeg"],
    }
    what = draft.rng.choice(list(cases))
    return _case(draft, what, [] if "zeros" in what else puts, cases[what])


def end(draft: Draft) -> Case:
    """Nothing, too little or too much where the tar ends."""
    first, subject, last, before, after = _parts(draft)
    plain = before + member(b"subject.png", subject.image)
    cases = {
        "no marker": plain + after,
        "half a marker": plain + after + bytes(512),
        "a few zeros": plain + after + bytes(300),
        "noise after": plain + after + END + draft.rng.randbytes(700),
        "a second tar": plain + END + after + END,
        "one zero block between": plain + bytes(512) + after + END,
        "a byte more": plain + after + END + b"x",
        "a megabyte of zeros": plain + after + bytes(1 << 20),
    }
    what = draft.rng.choice(list(cases))
    return _case(draft, what, [first, subject, last], cases[what])
