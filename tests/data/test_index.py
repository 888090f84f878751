import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iomm.config import DataConfig
from iomm.data import index as index_module
from iomm.data import shards as shards_module
from iomm.data.cache import cache_key
from iomm.data.errors import BadSample
from iomm.data.index import Index, ShardIndex, write_index
from iomm.data.indexer import Indexed, check_shard, index_shard, merge_indexes
from iomm.data.loader import Loader
from iomm.data.shards import ShardSet
from iomm.data.staleness import StaleIndex
from iomm.data.stores import Stamp
from iomm.data.tar_members import SampleRef
from tests.data.conftest import KEYS, encode, noise_image


@pytest.fixture
def indexed(shard) -> str:
    index_shard(shard)
    return shard


def refs(shards: ShardSet) -> list[tuple]:
    return [
        (s.shard, s.key, s.image_offset, s.image_size, s.caption_offset, s.caption_size)
        for s in (shards[i] for i in range(len(shards)))
    ]


def touch(path: str) -> None:
    """Another time of change, whatever the clock's resolution."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))


@pytest.mark.parametrize("captioned", [False, True])
def test_an_indexed_shard_has_the_samples_of_a_scanned_one_under_the_same_numbers(shard, captioned):
    scanned = ShardSet.open([shard], captioned_only=captioned)
    index_shard(shard)
    opened = ShardSet.open([shard], captioned_only=captioned)
    assert (scanned.indexed, opened.indexed) == (False, True)
    assert refs(opened) == refs(scanned)
    assert [opened.image_bytes(i) for i in range(len(opened))] == [
        scanned.image_bytes(i) for i in range(len(scanned))
    ]
    assert [opened.caption(i) for i in range(len(opened))] == [scanned.caption(i) for i in range(len(opened))]


def test_opening_an_indexed_shard_does_not_scan_it(indexed, monkeypatch):
    monkeypatch.setattr(shards_module, "scan", None)
    assert len(ShardSet.open([indexed])) == len(KEYS)


def test_the_index_knows_size_hash_and_verdict_of_each_image(write_shard, png):
    sideways = noise_image(9, 6).resize((6, 4))
    exif = sideways.getexif()
    exif[0x0112] = 6
    members = [("a.png", png(1)), ("b.jpg", encode(sideways, "JPEG", exif=exif)), ("c.png", png(2)[:60])]
    path = write_shard("one.tar", [*members, ("d.png", b"<html>")])
    made = index_shard(path)
    assert (made.images, [sample.key for sample in made.bad], made.renewed) == (4, ["c", "d"], True)
    shards = ShardSet.open([path])
    assert [shards.size_px(i) for i in range(4)] == [(8, 8), (4, 6), (8, 8), None]
    assert shards.content_hash(1) == cache_key(members[1][1])
    assert [shards.verdict(i) is None for i in range(4)] == [True, True, False, False]
    assert "not a JPEG, PNG or WebP" in str(shards.verdict(3))
    assert np.concatenate(list(shards.sizes_by_shard())).tolist() == [[8, 8], [4, 6], [8, 8], [0, 0]]
    assert shards.good_N().tolist() == [True, True, False, False]


def test_sizes_follow_the_numbers_of_a_captioned_set_over_several_shards(shard, write_shard, png):
    small = write_shard("small.tar", [("x.png", encode(noise_image(0, 5))), ("x.txt", b"five")])
    for path in (shard, small):
        index_shard(path)
    shards = ShardSet.open([shard, small], captioned_only=True)
    assert [shards[i].key for i in range(len(shards))] == ["a", "b", "c", "x"]
    assert np.concatenate(list(shards.sizes_by_shard())).tolist() == [[8, 8], [8, 8], [8, 8], [5, 5]]


def test_sizes_of_shards_without_an_index_are_an_error_that_names_the_command(shard):
    with pytest.raises(ValueError, match=r"train\.tar.*iomm shard index"):
        list(ShardSet.open([shard]).sizes_by_shard())


def test_an_image_that_failed_its_test_decode_is_refused_unread(write_shard, png):
    path = write_shard("one.tar", [("a.png", png(1)), ("b.png", b"<html>")])
    index_shard(path)
    shards = ShardSet.open([path])
    Path(path).write_bytes(b"")
    with pytest.raises(BadSample, match="not a JPEG"):
        shards.image_bytes(1)


def test_an_image_whose_bytes_changed_since_it_was_indexed_is_a_bad_sample(indexed):
    time = os.stat(indexed)
    ref = ShardSet.open([indexed])[2]
    with open(indexed, "r+b") as file:
        file.seek(ref.image_offset + ref.image_size - 20)
        file.write(b"?")
    os.utime(indexed, ns=(time.st_atime_ns, time.st_mtime_ns))
    shards = ShardSet.open([indexed])
    assert shards.image_bytes(1)
    with pytest.raises(BadSample, match="not those that were indexed"):
        shards.image_bytes(2)


def test_a_run_on_indexed_shards_has_the_samples_of_one_without(damaged, tmp_path):
    config = DataConfig(images=(damaged,), image_px=8, decode_threads=1, decode="cpu")

    def keys() -> tuple[list[str], set[str]]:
        reported: list[str] = []
        loader = Loader(config, 3, on_bad=lambda report: reported.append(report.key))
        return [loader.sample(i).key for i in range(20)], set(reported)

    before = keys()
    index_shard(damaged)
    assert keys() == before
    assert before[1] == {"b", "e", "g"}


@pytest.mark.parametrize(
    ("change", "hint"),
    [(touch, r"\. If it is a copy: cp -a "), (lambda path: Path(path).write_bytes(b"\0" * 10240 * 3), "$")],
)
def test_a_stale_index_is_refused_with_the_command_that_renews_it(indexed, change, hint):
    change(indexed)
    with pytest.raises(StaleIndex, match=rf"is stale: .* Renew it: iomm shard index {indexed}{hint}"):
        ShardSet.open([indexed])


def test_a_stale_index_is_renewed_without_decoding_images_that_did_not_change(indexed, monkeypatch):
    touch(indexed)
    monkeypatch.setattr("iomm.data.inspection.probe", None)
    assert index_shard(indexed).renewed
    assert ShardSet.open([indexed]).size_px(0) == (8, 8)


def test_an_index_that_fits_is_left_alone_unless_forced(indexed):
    before = os.stat(indexed + ".index").st_ino
    assert index_shard(indexed) == Indexed(len(KEYS), [], False)
    assert os.stat(indexed + ".index").st_ino == before
    assert index_shard(indexed, force=True).renewed


def test_a_merged_index_stands_for_all_its_shards(shard, write_shard, png, tmp_path):
    other = write_shard("b/other.tar", [("z.png", png(8)), ("z.txt", b"last")])
    for path in (shard, other):
        index_shard(path)
    merged = str(tmp_path / "set.index")
    merge_indexes([shard + ".index", other + ".index"], merged)
    shards = ShardSet.open([merged], captioned_only=True)
    assert refs(shards) == refs(ShardSet.open([shard, other], captioned_only=True))
    assert shards.caption(3) == "last"
    with pytest.raises(ValueError, match="named twice"):
        ShardSet.open([merged, shard])
    touch(other)
    with pytest.raises(StaleIndex, match=r"iomm shard index .* -o .*set\.index"):
        ShardSet.open([merged])
    Path(other).unlink()
    with pytest.raises(FileNotFoundError, match=r"other\.tar: no such shard, but .*set\.index lists it"):
        ShardSet.open([merged])


def test_indexes_are_no_shards_of_a_glob(indexed):
    assert len(ShardSet.open([str(Path(indexed).parent / "*")])) == len(KEYS)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_an_index_never_changes_a_sample_in_silence(
    position, bit, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("flip")
    samples = [
        SampleRef(
            "s", f"k{n}", 512 + n, 9, *((700 + n, 3) if n % 2 else (None, None)), "ab" * 16, (3, 4), reason
        )
        for n, reason in enumerate((None, "no", None, None))
    ]
    path = folder / "s.tar.index"
    write_index(str(path), [ShardIndex.build("s.tar", Stamp(10, 0), samples)])
    good = [Index.open(str(path)).sample(0, j) for j in range(4)]
    captioned = [Index.open(str(path)).sample(0, j, captioned=True) for j in range(2)]
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    index_module._open_again.cache_clear()
    for read, expected in ((False, good), (True, captioned)):
        for j, sample in enumerate(expected):
            try:
                found = Index.open(str(path)).sample(0, j, captioned=read)
            except ValueError as error:
                assert "Make it again with: iomm shard index" in str(error)
            else:
                assert found == sample or read  # captioned numbers have no checksum of their own ...
                assert found in good  # ... but lead to a whole record


def test_a_damaged_part_is_found_by_check(indexed):
    path = Path(indexed + ".index")
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in check_shard(Index.open(str(path)), 0)[0]


def test_check_finds_nothing_wrong_with_a_shard_that_was_just_indexed(indexed):
    assert check_shard(Index.open(indexed + ".index"), 0) == []


def test_check_names_the_images_whose_bytes_changed(indexed):
    time = os.stat(indexed).st_mtime_ns
    ref = ShardSet.open([indexed])[2]
    with open(indexed, "r+b") as file:
        file.seek(ref.image_offset)
        file.write(b"?")
    os.utime(indexed, ns=(time, time))
    assert check_shard(Index.open(indexed + ".index"), 0) == [
        "sample 'c': its bytes are not those that were indexed"
    ]


@pytest.mark.parametrize("length", [0, 5, 30, 200])
def test_a_torn_index_is_an_error_that_names_the_way_out(indexed, length):
    path = Path(indexed + ".index")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"train\.tar\.index: not an index, or damaged"):
        ShardSet.open([indexed])
    assert index_shard(indexed).renewed


def test_an_index_of_another_version_is_refused(indexed):
    path = Path(indexed + ".index")
    data = bytearray(path.read_bytes())
    data[8] = 99
    path.write_bytes(data)
    with pytest.raises(ValueError, match="an index of version 99; this iomm reads version 1"):
        ShardSet.open([indexed])


def test_an_index_that_was_replaced_while_in_use_is_refused_not_misread(indexed):
    shards = ShardSet.open([indexed])
    touch(indexed)
    index_shard(indexed)
    index_module._open_again.cache_clear()
    with pytest.raises(ValueError, match="was replaced while in use"):
        _ = shards[0]


def test_one_failed_write_leaves_the_old_index(indexed, monkeypatch):
    before = Path(indexed + ".index").read_bytes()
    monkeypatch.setattr(index_module.json, "dumps", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index_shard(indexed, force=True)
    assert Path(indexed + ".index").read_bytes() == before
    assert not list(Path(indexed).parent.glob("*.part"))


def test_the_footer_is_json_that_describes_the_shards(indexed):
    data = Path(indexed + ".index").read_bytes()
    length, crc = struct.unpack("<II", data[-16:-8])
    footer = data[-16 - length : -16]
    assert zlib.crc32(footer) == crc
    assert json.loads(footer)["shards"][0]["images"] == len(KEYS)


def test_a_key_that_no_index_can_hold_is_an_error_that_names_it():
    sample = SampleRef("s", "k" * 70_000, 512, 9, None, None, "ab" * 16)
    with pytest.raises(ValueError, match=r"s\.tar: key 'kkk.*70000 bytes, the limit is 65535"):
        ShardIndex.build("s.tar", Stamp(1, 1), [sample])
