"""Cases of indexes that are damaged or lie, of stopped makes, and of files that change while read."""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iomm.data.index import _HEAD, _TRAILER, MAGIC, RECORD, record_crc
from iomm.data.indexer import index_shard, merge_indexes
from iomm.data.inspection import Limits
from iomm.data.shard_writer import QUARANTINE, STATE, MakeOptions, _state_crc, make_shards
from iomm.data.sources import FolderSource
from tests.data.fuzz import images, tars
from tests.data.fuzz.cases import Case, Draft, During

LIMITS = Limits(max_pixels=images.MAX_PIXELS)
_BYTES = ("bits flipped", "overwritten", "truncated", "piece cut out", "piece put in", "extreme number")
_ODD: tuple[Any, ...] = (-1, 0, 1 << 40, 1 << 62, 1 << 90, 1.5, "7", None, [], {}, True, "\ud800", "a\0b")


def damaged_index(draft: Draft) -> Case:
    """An index with damage anywhere."""
    puts = draft.good(3, must=True)
    shard = draft.tar(puts)
    index_shard(str(shard))
    index = Path(f"{shard}.index")
    what = draft.rng.choice((*_BYTES, "a tar", "empty", "a folder"))
    if what == "a folder":
        index.unlink()
        index.mkdir()
        puts = [replace(put, must=False) for put in puts]
    else:
        data = index.read_bytes()
        other = {"a tar": shard.read_bytes(), "empty": b""}
        index.write_bytes(other[what] if what in other else images.DAMAGE[what](draft.rng, data))
    return Case(what=what, puts=puts, shard=shard, indexed=True)


def lying_index(draft: Draft) -> Case:
    """An index that is whole by its checksums, and says what is not so."""
    puts = draft.good(3)
    shard = draft.tar(puts)
    index_shard(str(shard))
    index = Path(f"{shard}.index")
    if draft.rng.random() < 0.6:
        what, data = _false_footer(draft, index.read_bytes())
    else:
        what, data = _false_record(draft, index.read_bytes())
    index.write_bytes(data)
    return Case(what=what, puts=puts, shard=shard, indexed=True)


def _split(data: bytes) -> tuple[bytes, dict[str, Any]]:
    length, _, _ = _TRAILER.unpack(data[-_TRAILER.size :])
    body = data[: -_TRAILER.size - length]
    return body, json.loads(data[len(body) : -_TRAILER.size])


def _joined(body: bytes, footer: Any) -> bytes:
    text = footer if isinstance(footer, bytes) else json.dumps(footer).encode()
    return body + text + _TRAILER.pack(len(text), zlib.crc32(text), MAGIC)


def _false_footer(draft: Draft, data: bytes) -> tuple[str, bytes]:
    body, footer = _split(data)
    row = footer["shards"][0]
    key, value = draft.rng.choice(sorted(row)), draft.rng.choice(_ODD)
    cases: dict[str, Any] = {
        "no key": {"shards": [{k: v for k, v in row.items() if k != key}]},
        "another key": {"shards": [row | {"blake3": "0"}]},
        "no shards": {},
        "an empty list": {"shards": []},
        "no list": {"shards": value},
        "no row": {"shards": [value]},
        "no object": value,
        "no JSON": b"{",
        "no text": b"\xff\xfe",
        "deep": b"[" * 20_000,
        "the shard twice": {"shards": [row, row]},
        "many shards": {"shards": [row | {"name": f"{n}.tar"} for n in range(3000)]},
    }
    what = draft.rng.choice((*cases, *["a value"] * len(cases)))
    if what != "a value":
        return f"{what} in the footer", _joined(body, cases[what])
    row[key] = value
    return f"{key} {value!r} in the footer", _joined(body, footer)


def _false_record(draft: Draft, data: bytes) -> tuple[str, bytes]:
    body, footer = _split(data)
    row = footer["shards"][0]
    records_N = np.frombuffer(body, RECORD, row["images"], _HEAD.size).copy()
    field = draft.rng.choice([name for name in RECORD.names or () if name not in ("crc32", "content_hash")])
    limit = 1 << (8 * RECORD[field].itemsize)
    value = draft.rng.choice((0, 1, 7, 1 << 31, limit >> 1, limit - 1)) % limit
    records_N[1][field] = value
    start = _HEAD.size + row["images"] * RECORD.itemsize + 4 * row["captioned"]
    at, size = (
        int(records_N[1]["text_offset"]),
        int(records_N[1]["key_bytes"]) + int(records_N[1]["reason_bytes"]),
    )
    text = body[start : start + row["text_bytes"]][at : at + size]
    records_N[1]["crc32"] = record_crc(records_N[1].tobytes(), text)
    section = records_N.tobytes() + body[_HEAD.size + records_N.nbytes :]
    row["crc32"] = zlib.crc32(section)
    return f"{field} {value} in a record", _joined(body[: _HEAD.size] + section, footer)


def merged_index(draft: Draft) -> Case:
    """A data set's index of two shards, of which one is missing, another, shorter, or fine."""
    puts = draft.good(4)
    one, two = draft.tar(puts[:2], "one.tar"), draft.tar(puts[2:], "two.tar")
    for shard in (one, two):
        index_shard(str(shard))
    index = draft.folder / "set.index"
    merge_indexes([f"{one}.index", f"{two}.index"], str(index))
    things: dict[str, Callable[[], object]] = {
        "fine": lambda: None,
        "a shard is missing": two.unlink,
        "a shard is shorter": lambda: os.truncate(two, two.stat().st_size - 512),
        "a shard is empty": lambda: os.truncate(two, 0),
        "a shard is another of its size and time": lambda: _same_stamp(two, two.read_bytes()[::-1]),
        "the index is damaged": lambda: index.write_bytes(
            images.DAMAGE[draft.rng.choice(_BYTES)](draft.rng, index.read_bytes())
        ),
        "a shard is a folder": lambda: (two.unlink(), two.mkdir()),
    }
    what = draft.rng.choice(list(things))
    things[what]()
    return Case(what=what, puts=puts, shard=index, indexed=True, routes=("check", "load"))


def _same_stamp(path: Path, data: bytes) -> None:
    time_ns = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(time_ns, time_ns))


def stopped_make(draft: Draft) -> Case:
    """A make that was stopped, and whose folder was damaged before it goes on."""
    whole = draft.rng.random() < 0.1
    puts = draft.good(4, must=whole)
    photos, output = draft.folder / "photos", draft.folder / "out"
    for put in puts:
        for name, data in put.members:
            draft.write(b"photos/" + name, data)
    draft.write("photos/broken.png", b"no image")
    make_shards([FolderSource(str(photos))], output, MakeOptions(shard_images=1, limits=LIMITS))
    state = json.loads((output / STATE).read_text())
    state["progress"]["done"] = draft.rng.random() < 0.3
    state["crc32"] = _state_crc({name: state[name] for name in ("job", "progress")})
    (output / STATE).write_text(json.dumps(state, indent=1))
    name = draft.rng.choice(
        (STATE, STATE, STATE, QUARANTINE, "shard-000001.tar.index", "shard-000001.tar", "set.index")
    )
    path = output / name
    if whole:
        return Case(what="whole", puts=puts, source=photos, output=output)
    what = draft.rng.choice((*_BYTES, "gone", "empty", "a folder", "a value"))
    if what == "a value" and name == STATE:
        key = draft.rng.choice(sorted(state["progress"]))
        state["progress"][key] = draft.rng.choice(_ODD)
        path.write_text(json.dumps(state))
    elif what in ("gone", "a folder"):
        path.unlink()
        if what == "a folder":
            path.mkdir()
    else:
        damage = images.DAMAGE.get(what, lambda _rng, _data: b"")
        path.write_bytes(damage(draft.rng, path.read_bytes()))
    return Case(what=f"{name}: {what}", puts=puts, source=photos, output=output)


def shard_name(draft: Draft) -> Case:
    """A sound shard under a strange file name."""
    names = {
        "newline": b"set\n2.tar",
        "not UTF-8": b"set\xff\xfe.tar",
        "glob": b"set[1]*?.tar",
        "percent and brace": b"set%s{}{0}$(x).tar",
        "escape": b"\x1b[2Jset.tar",
        "spaces": b" set .tar",
        "no suffix": b"set",
        "capitals": b"SET.TAR",
        "dashes": b"--help",
        "long": b"s" * 225 + b".tar",
    }
    what = draft.rng.choice(list(names))
    puts = draft.good(3, must=True)
    shard = draft.tar(puts, names[what])
    return Case(what=what, puts=puts, source=shard, shard=shard)


def changing(draft: Draft) -> Case:
    """A shard that is cut, emptied, overwritten, replaced or removed while it is read."""
    rng, puts = draft.rng, draft.good(5)
    shard = draft.tar(puts)
    size = shard.stat().st_size
    at = rng.randrange(size)

    def zeros() -> None:
        with open(shard, "r+b") as file:
            file.seek(at)
            file.write(bytes(size - at))

    def replaced() -> None:
        other = draft.write("other.tar", tars.tar([(b"other.png", images.variants()["png"])]))
        os.replace(other, shard)

    def longer() -> None:
        with open(shard, "ab") as file:
            file.write(rng.randbytes(700))

    actions: dict[str, Callable[[], object]] = {
        "cut": lambda: os.truncate(shard, at),
        "emptied": lambda: os.truncate(shard, 0),
        "overwritten with zeros": zeros,
        "replaced": replaced,
        "removed": shard.unlink,
        "grown": longer,
    }
    indexed = rng.random() < 0.4
    if indexed:
        index_shard(str(shard))
    what, route = rng.choice(list(actions)), rng.choice(("make", "index", "load", "load"))
    during = During(shard, rng.randrange(12), lambda: (actions[what](), None)[1])
    return Case(
        what=f"{what} in {route}",
        puts=puts,
        source=shard,
        shard=shard,
        during=during,
        indexed=indexed,
        routes=(route,),
        swallows=what in ("overwritten with zeros", "replaced"),  # which makes it another sound tar
    )
