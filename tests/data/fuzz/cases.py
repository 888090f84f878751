"""One input of the fuzzer: files in a folder, and what was put into them."""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.data.fuzz import images, tars


@dataclass(frozen=True, slots=True)
class Put:
    """An image that somebody put somewhere, which has to be accounted for."""

    token: str  # part of its name, and of no other's
    image: bytes
    caption: bytes | None = None
    json: bool = False  # the caption is JSON, which only `iomm shard make` reads
    must: bool = False  # sound, in a sound container: it has to be used
    silent: bool = False  # of a name or type that is left alone by rule: hidden, or a folder

    @property
    def members(self) -> list[tuple[bytes, bytes]]:
        """As a sound tar holds it."""
        name = self.token.encode()
        found = [(name + b"." + images.suffix_of(self.image).encode(), self.image)]
        if self.caption is not None:
            found.append((name + (b".json" if self.json else b".txt"), self.caption))
        return found


@dataclass(frozen=True, slots=True)
class During:
    """Something that happens to a file while it is read."""

    path: Path
    before_read: int  # counted from 0
    action: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An input, written to a folder."""

    what: str  # what was done, for people
    puts: Sequence[Put]
    source: Path | None = None  # what `iomm shard make` packs; None: not asked
    shard: Path | None = None  # what `iomm shard index` and the loader get
    output: Path | None = None  # where an earlier make was stopped
    swallows: bool = False  # one member claims the bytes of others, which nobody can tell from its own
    during: During | None = None
    indexed: bool = False  # the shard has an index beside it, which may be damaged
    data: Mapping[str, Any] = field(default_factory=dict)  # settings of the loader
    buckets: bool = False  # the loader by index has aspect-ratio buckets
    routes: Sequence[str] = ("load", "make", "check", "index", "load by index")


@dataclass
class Draft:
    """What a kind of case is made with: randomness, a folder, and sound images."""

    rng: random.Random
    folder: Path
    _named: int = field(default=0)

    def write(self, name: str | bytes, data: bytes) -> Path:
        """A file in the case's folder."""
        path = self.folder / (os.fsdecode(name) if isinstance(name, bytes) else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def good(self, count: int, *, must: bool = False) -> list[Put]:
        """Sound images with captions."""
        return [
            Put(f"good{letter}", image, b"caption of " + letter.encode(), must=must)
            for letter, image in zip("ABCDEFGH", images.small(self.rng, count), strict=False)
        ]

    def tar(self, puts: Sequence[Put], name: str | bytes = "set.tar") -> Path:
        """A sound shard of them."""
        return self.write(name, tars.tar([m for put in puts for m in put.members]))

    def source_of(self, puts: Sequence[Put], shard: Path) -> Path:
        """The shard, or the same images in a folder or as Parquet."""
        kind = self.rng.choice(("tar", "tar", "folder", "parquet"))
        if kind == "folder":
            for put in puts:
                for name, data in put.members:
                    self.write(b"photos/" + name, data)
            return self.folder / "photos"
        if kind == "parquet" and not any(put.json for put in puts):
            rows: list[dict[str, object]] = [{"image": put.image, "caption": put.caption} for put in puts]
            return self.write("rows.parquet", images.as_parquet(rows))
        return shard


def around(draft: Draft, what: str, subject: Put) -> Case:
    """A case of one image between two sound ones, in a sound container."""
    first, last = draft.good(2, must=True)
    puts = [first, subject, last]
    shard = draft.tar(puts)
    return Case(what=what, puts=puts, shard=shard, source=draft.source_of(puts, shard))


def damaged_image(damage: str) -> Callable[[Draft], Case]:
    """A kind: one of the sound variants, with this damage."""

    def make(draft: Draft) -> Case:
        variants = images.variants()
        name = draft.rng.choice(list(variants))
        data = images.DAMAGE[damage](draft.rng, variants[name])
        return around(draft, f"{damage} in {name}", Put("subject", data, b"a caption"))

    return make


def variant(draft: Draft) -> Case:
    """A sound image of some variety, which has to be used."""
    name = draft.rng.choice(list(images.variants()))
    return around(draft, name, Put("subject", images.variants()[name], must=True))


def stranger(draft: Draft) -> Case:
    """Another format, empty, or noise, under an image's name."""
    name, data = draft.rng.choice([*images.strangers().items(), ("noise", draft.rng.randbytes(2000))])
    return around(draft, name, Put("subject", data))


def heavy(draft: Draft) -> Case:
    """A small image file that asks for much memory or time."""
    what, data = images.heavy(draft.rng)
    return around(draft, what, Put("subject", data, must=what == "pixels at the limit"))


def wrong_extension(draft: Draft) -> Case:
    """A sound image under another format's suffix: the content counts."""
    first, subject, last = draft.good(3, must=True)
    name = draft.rng.choice(list(images.variants()))
    subject = replace(subject, token="subject", image=images.variants()[name])
    suffix = draft.rng.choice((b".jpg", b".png", b".webp", b".JPEG", b".jpeg"))
    members = [*first.members, (b"subject" + suffix, subject.image), *subject.members[1:], *last.members]
    shard = draft.write("set.tar", tars.tar(members))
    return Case(what=f"{name} as {suffix.decode()}", puts=[first, subject, last], shard=shard, source=shard)


CAPTIONS: dict[str, Callable[[random.Random], bytes]] = {
    "not UTF-8": lambda rng: b"caf\xe9 " + rng.randbytes(20),
    "UTF-16": lambda _rng: "a caption".encode("utf-16"),
    "empty": lambda _rng: b"",
    "blank": lambda _rng: b" \n\t \r\n",
    "NUL": lambda _rng: b"a\0b",
    "byte order mark": lambda _rng: b"\xef\xbb\xbfa caption",
    "surrogate": lambda _rng: b"\xed\xa0\x80",
    "control": lambda _rng: b"\x1b[31m\x07\x08",
    "1 MB": lambda _rng: b"words " * 170_000,
    "one line of 70,000": lambda _rng: b"x" * 70_000,
}
JSON_CAPTIONS: dict[str, Callable[[random.Random], bytes]] = {
    "no JSON": lambda rng: rng.choice((b"", b"{", b"caption", b'{"caption": "a}', b"\xff\xfe", bytes(9))),
    "no object": lambda rng: rng.choice((b"[]", b"null", b"1", b'"caption"', b'[{"caption": "a"}]')),
    "no text": lambda rng: rng.choice((b'{"caption": 1}', b'{"caption": ["a"]}', b'{"caption": {}}')),
    "deep": lambda _rng: b'{"caption": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "a number of 60,000 digits": lambda _rng: b'{"caption": "a", "n": ' + b"9" * 60_000 + b"}",
    "a lone surrogate": lambda _rng: b'{"caption": "\\ud800"}',
    "twice": lambda _rng: b'{"caption": "a", "caption": "b"}',
    "UTF-16": lambda _rng: '{"caption": "a"}'.encode("utf-16"),
    "not a number": lambda _rng: b'{"caption": "a", "n": NaN, "m": 1e999}',
}


def caption(draft: Draft) -> Case:
    """A strange caption of a sound image, which stays an image."""
    what, make = draft.rng.choice([*CAPTIONS.items(), *JSON_CAPTIONS.items()])
    [good] = draft.good(1)
    subject = Put("subject", images.small(draft.rng, 3)[2], make(draft.rng), must=True)
    if good.image == subject.image:
        subject = replace(subject, image=images.variants()["png"])
    return around(draft, what, replace(subject, json=make in JSON_CAPTIONS.values()))


def folder(draft: Draft) -> Case:
    """A folder of images with something strange in it, under a strange name."""
    first, last = draft.good(2, must=True)
    for put in (first, last):
        for name, data in put.members:
            draft.write(b"photos/" + name, data)
    [image] = images.small(draft.rng, 1)
    subject = Put("subject", image + b"\0")
    what = draft.rng.choice(list(FOLDER_NAMES) + list(FOLDER_THINGS))
    if what in FOLDER_NAMES:
        subject = replace(subject, must=not what.startswith("hidden"), silent=what.startswith("hidden"))
        draft.write(b"photos/" + FOLDER_NAMES[what], subject.image)
    else:
        FOLDER_THINGS[what](draft.folder / "photos" / "subject.png")
        subject = replace(subject, silent=what == "a folder")
    return Case(what=what, puts=[first, subject, last], source=draft.folder / "photos")


FOLDER_NAMES = {
    "newline": b"subject\n2.png",
    "not UTF-8": b"subject\xff\xfe.png",
    "255 bytes": b"subject" + b"x" * 244 + b".png",
    "escape": b"subject\x1b[2J\r.png",
    "only dots behind": b"subject....png",
    "deep": b"a/b/c/d/e/subject.png",
    "odd folder": b"\xff\n/subject.png",
    "hidden": b".subject.png",
    "hidden folder": b".git/subject.png",
    "no suffix": b"subject",
    "address": b"s3:/subject.png",
}
FOLDER_THINGS: dict[str, Callable[[Path], None]] = {
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere.png"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a folder": lambda path: path.symlink_to("/"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
}


def parquet(draft: Draft) -> Case:
    """A damaged Parquet file."""
    puts = draft.good(3)
    rows: list[dict[str, object]] = [{"image": put.image, "caption": "text"} for put in puts]
    damage = draft.rng.choice(list(images.DAMAGE)[:-1])
    data = images.DAMAGE[damage](draft.rng, images.as_parquet(rows))
    if draft.rng.random() < 0.5:  # the last 200 bytes are what a reader begins with
        tail = images.DAMAGE[damage](draft.rng, data[-200:])
        data = data[:-200] + tail
    return Case(what=damage, puts=puts, source=draft.write("rows.parquet", data))
