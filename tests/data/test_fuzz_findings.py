"""What `make fuzz-data` found, each in its smallest form."""

import json
import logging
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest

from iomm.cli import main
from iomm.data.decode import decode_image
from iomm.data.decode_header import probe
from iomm.data.errors import BadSample
from iomm.data.index import _TRAILER, MAGIC, Index
from iomm.data.indexer import index_shard
from iomm.data.inspection import Limits, Rejected
from iomm.data.shard_writer import make_shards
from iomm.data.shards import ShardSet
from iomm.data.sources import FolderSource, ParquetSource, TarSource
from iomm.data.stores import open_reader
from tests.data.fuzz import images, tars


def with_footer(path: Path, footer: object) -> None:
    """Another footer in an index, with a checksum that is right."""
    data = path.read_bytes()
    body = data[: -_TRAILER.size - _TRAILER.unpack(data[-_TRAILER.size :])[0]]
    text = json.dumps(footer).encode()
    path.write_bytes(body + text + _TRAILER.pack(len(text), zlib.crc32(text), MAGIC))


@pytest.mark.parametrize(
    "change",
    [
        {"start": 1.5},
        {"images": -1},
        {"text_bytes": 1 << 62},
        {"name": "a\0b"},
        {"name": "\ud800"},
        {"new": 1},
    ],
    ids=str,
)
def test_a_footer_that_says_what_cannot_be_is_refused_by_name_and_made_again(shard, change):
    index_shard(shard)
    path = Path(f"{shard}.index")
    row = asdict(Index.open(str(path)).shards[0])
    with_footer(path, {"shards": [row | change]})
    with pytest.raises(ValueError, match=r"train\.tar\.index: not an index, or damaged: its footer"):
        ShardSet.open([shard])
    assert index_shard(shard).renewed
    assert ShardSet.open([shard]).indexed


def test_an_index_renewed_in_a_process_that_read_the_damaged_one_is_the_one_that_is_read(shard):
    index_shard(shard)
    path = Path(f"{shard}.index")
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    with pytest.raises(ValueError, match="does not match its checksum"):
        Index.open(str(path)).sample(0, 0)
    index_shard(shard)
    assert Index.open(str(path)).sample(0, 0).key == "a"


def test_a_long_chain_of_extended_headers_is_a_torn_shard(tmp_path, png):
    chain = tars.pax(tars.record(b"comment", b"y")) * 1500
    path = tmp_path / "set.tar"
    path.write_bytes(chain + tars.tar([(b"a.png", png(1))]))
    with pytest.raises(ValueError, match=r"set\.tar: .*recursion"):
        ShardSet.open([str(path)])


def test_a_tail_of_zeros_as_an_unfinished_download_leaves_it_is_a_torn_shard(tmp_path, png):
    path = tmp_path / "set.tar"
    path.write_bytes(tars.tar([(b"a.png", png(1))]) + bytes(10_240))
    assert len(ShardSet.open([str(path)])) == 1
    path.write_bytes(path.read_bytes() + bytes(1 << 16))
    with pytest.raises(ValueError, match="more than 65536 zeros, as an unfinished download leaves them"):
        ShardSet.open([str(path)])
    entries = list(TarSource(str(path), Limits()).items())
    assert [type(entry) is Rejected for entry in entries] == [False, True]


def test_a_file_named_as_a_folder_is_rejected_and_not_forgotten(tmp_path, png):
    path = tmp_path / "set.tar"
    path.write_bytes(tars.tar([(b"a.png", png(1)), (b"b.png/", png(2)), (b"._a.png", b"macOS")]))
    [rejected] = [entry for entry in TarSource(str(path), Limits()).items() if isinstance(entry, Rejected)]
    assert rejected.name == f"{path}: b.png/" and rejected.reason.startswith("no image")


def test_a_second_image_of_a_key_is_said_to_be_left_out(tmp_path, png, caplog):
    path = tmp_path / "set.tar"
    path.write_bytes(tars.tar([(b"a.png", png(1)), (b"a.jpg", b"another")]))
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open([str(path)])) == 1
    assert "1 images whose key has one already left out, such as 'a.jpg'" in caplog.text


def test_a_caption_of_a_megabyte_is_no_caption(tmp_path, png):
    path = tmp_path / "set.tar"
    path.write_bytes(tars.tar([(b"a.png", png(1)), (b"a.txt", b"words " * 200_000)]))
    shards = ShardSet.open([str(path)])
    assert shards.image_bytes(0) == png(1)
    with pytest.raises(BadSample, match="the caption has 1200000 bytes, more than the limit of 65536"):
        shards.caption(0)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OSError, match=tmp_path.name):
        open_reader(str(tmp_path)).read(0, 1)


def test_an_offset_that_no_file_can_have_is_an_end_of_file_that_names_it(shard):
    with pytest.raises(OSError, match=r"train\.tar: ends before byte 9223372036854775809"):
        open_reader(shard).read(1 << 63, 1)


def test_a_shard_whose_name_is_no_text_is_indexed_and_printed(tmp_path, png, capsysbinary):
    path = os.path.join(tmp_path, os.fsdecode(b"set\xff.tar"))
    Path(path).write_bytes(tars.tar([(b"a.png", png(1))]))
    assert main(["shard", "index", path, "--processes", "1"]) == 0
    assert rb"set\udcff.tar: indexed" in capsysbinary.readouterr().out


@pytest.fixture
def made(tmp_path, png) -> tuple[FolderSource, Path]:
    """A finished make of one image and one other file."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png(1))
    (tmp_path / "photos/b.png").write_bytes(b"no image")
    source = FolderSource(str(tmp_path / "photos"))
    make_shards([source], tmp_path / "out")
    return source, tmp_path / "out"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"job": {}}', b"\xff", b"[" * 20_000], ids=len)
def test_a_damaged_state_of_a_make_is_refused_by_name(made, data):
    (made[1] / "make.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"make\.json: damaged: .* begin again in a new folder"):
        make_shards([made[0]], made[1])


def test_a_changed_number_in_the_state_of_a_make_is_found(made):
    path = made[1] / "make.json"
    path.write_text(path.read_text().replace('"done": true', '"done": false'))
    with pytest.raises(ValueError, match="does not match its checksum"):
        make_shards([made[0]], made[1])


def test_a_quarantine_list_that_lost_its_end_is_refused_by_name(made):
    state = json.loads((made[1] / "make.json").read_text())
    state["progress"]["done"] = False
    del state["crc32"]
    state["crc32"] = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    (made[1] / "make.json").write_text(json.dumps(state))
    (made[1] / "quarantine.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"quarantine\.jsonl: damaged: it has 0 of its"):
        make_shards([made[0]], made[1])


def test_a_link_to_a_folder_is_not_followed_and_said(tmp_path, png):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png(1))
    (tmp_path / "photos/more").symlink_to("/")
    entries = list(FolderSource(str(tmp_path / "photos")).items())
    assert [entry.reason for entry in entries if isinstance(entry, Rejected)] == [
        "not a plain file, but a device, or a link to a folder or nowhere"
    ]


def test_damaged_bytes_of_parquet_are_said_to_be_the_files(tmp_path, png):
    data = bytearray(images.as_parquet([{"image": png(n) * 20} for n in range(3)]))
    data[20] ^= 0xFF  # in the compressed pixels
    path = tmp_path / "rows.parquet"
    path.write_bytes(data)
    *_, last = ParquetSource(str(path)).items()
    assert isinstance(last, Rejected) and last.name == str(path) and "a damaged Parquet file" in last.reason


def test_a_jpeg_of_a_thousand_scans_is_refused_by_its_header():
    for read in (probe, lambda data: decode_image(data, 16)):
        with pytest.raises(BadSample, match="a JPEG of 10.. scans, more than the limit of 100"):
            read(images.scans(1000))
    assert probe(images.variants()["jpeg progressive"]).format == "jpeg"
