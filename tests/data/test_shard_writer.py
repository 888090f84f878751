import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iomm.data.index import Index
from iomm.data.indexer import check_shard
from iomm.data.inspection import Inspected, Item, Limits, inspect_all
from iomm.data.shard_writer import MAX_KEY, MakeOptions, fit_key, make_shards
from iomm.data.shards import ShardSet
from iomm.data.sources import FolderSource, ParquetSource, TarSource, open_sources
from tests.data.conftest import encode, noise_image

SMALL = MakeOptions(shard_images=2)


@pytest.fixture
def photos(tmp_path, png) -> Path:
    """Seven images in two folders: two have captions, two are one image, one is broken."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.png", "trip/a.png", "trip/c.png", "trip/d.png")):
        (folder / name).write_bytes(png(n))
    (folder / "trip/e.png").write_bytes(png(0))
    (folder / "trip/f.jpg").write_bytes(png(5))
    (folder / "broken.png").write_bytes(png(6)[:60])
    (folder / "a.txt").write_text(" a caption\n")
    (folder / "trip/c.json").write_text('{"caption": "from JSON"}')
    (folder / "trip/d.txt").write_bytes(b"\xff")
    (folder / "lonely.txt").write_text("no image")
    return folder


def quarantine(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    return {Path(row["sample"]).name: row["reason"] for row in rows}


def opened(folder: Path) -> dict[str, tuple[bytes, str | None]]:
    shards = ShardSet.open([str(folder / "set.index")])
    return {shards[i].key: (shards.image_bytes(i), shards.caption(i)) for i in range(len(shards))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_a_folder_becomes_shards_with_captions_and_an_index_of_them_all(photos, tmp_path, png):
    done = make_shards([FolderSource(str(photos))], tmp_path / "out", SMALL)
    assert (done.images, done.captions, done.shards, done.duplicates) == (6, 2, 3, 1)
    assert opened(tmp_path / "out") == {
        "a": (png(0), "a caption"),
        "b": (png(1), None),
        "trip_a": (png(2), None),
        "trip_c": (png(3), "from JSON"),
        "trip_d": (png(4), None),
        "trip_f": (png(5), None),
    }
    index = Index.open(str(tmp_path / "out" / "set.index"))
    assert [check_shard(index, k) for k in range(3)] == [[], [], []]


def test_the_raw_tars_open_without_their_index_too(photos, tmp_path):
    make_shards([FolderSource(str(photos))], tmp_path / "out", SMALL)
    with_index = opened(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.index"):
        path.unlink()
    shards = ShardSet.open([str(tmp_path / "out" / "*.tar")])
    assert {shards[i].key: (shards.image_bytes(i), shards.caption(i)) for i in range(6)} == with_index


def test_what_is_left_out_is_listed_with_its_reason(photos, tmp_path):
    make_shards([FolderSource(str(photos))], tmp_path / "out", SMALL)
    reasons = quarantine(tmp_path / "out")
    assert set(reasons) == {"broken.png", "e.png", "lonely.txt", "d.png"}
    assert "cannot be decoded" in reasons["broken.png"]
    assert reasons["e.png"] == "the same bytes as an image before it"
    assert reasons["lonely.txt"] == "a caption, but no image has its name"
    assert reasons["d.png"] == "kept without its caption: the caption is not UTF-8: byte 0 is 0xff"


def test_a_file_named_jpg_that_is_a_png_gets_the_suffix_of_what_it_is(photos, tmp_path):
    make_shards([FolderSource(str(photos))], tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert "trip_f.png" in tar.getnames()


@pytest.mark.parametrize("stop_after", range(1, 8))
def test_a_make_that_was_stopped_goes_on_and_writes_the_same_shards(photos, tmp_path, stop_after):
    sources = [FolderSource(str(photos / "trip")), FolderSource(str(photos))]
    whole = make_shards(sources, tmp_path / "whole", SMALL)
    left = [stop_after]

    def stop(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(sources, tmp_path / "out", SMALL, on_progress=stop)
    assert make_shards(sources, tmp_path / "out", SMALL) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert quarantine(tmp_path / "out") == quarantine(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.part"))


KILLED = """
import os, signal, sys
from pathlib import Path
from iomm.data.shard_writer import MakeOptions, make_shards
from iomm.data.sources import FolderSource

def kill(now):
    if now.images == 5:
        os.kill(os.getpid(), signal.SIGKILL)

make_shards([FolderSource(sys.argv[1])], Path(sys.argv[2]), MakeOptions(shard_images=2), on_progress=kill)
"""


@pytest.mark.multi
def test_a_make_that_was_killed_outright_goes_on_behind_its_last_whole_shard(photos, tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(photos), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == -9
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == [
        "shard-000000.tar",
        "shard-000000.tar.index",
        "shard-000001.tar",
        "shard-000001.tar.index",
        "shard-000002.tar.part",
    ]
    make_shards([FolderSource(str(photos))], tmp_path / "whole", SMALL)
    make_shards([FolderSource(str(photos))], tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert quarantine(tmp_path / "out") == quarantine(tmp_path / "whole")


def test_json_that_holds_no_caption_is_no_bad_caption(tmp_path, png):
    folder = tmp_path / "in"
    folder.mkdir()
    for n, text in enumerate(('{"width": 8}', '{"caption": 3}', "[1]", "{")):
        (folder / f"{n}.png").write_bytes(png(n))
        (folder / f"{n}.json").write_text(text)
    (folder / "old.tar").write_bytes(b"")
    make_shards([FolderSource(str(folder))], tmp_path / "out")
    reasons = quarantine(tmp_path / "out")
    assert set(reasons) == {"1.png", "2.png", "3.png", "old.tar"}
    assert reasons["1.png"].endswith("the caption's JSON in 'caption' holds no text but int")
    assert reasons["old.tar"] == "not looked into: name it as a source of its own"
    assert set(opened(tmp_path / "out")) == set("0123")


def test_a_finished_make_has_nothing_left_to_do(photos, tmp_path):
    first = make_shards([FolderSource(str(photos))], tmp_path / "out", SMALL)
    times = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make_shards([FolderSource(str(photos))], tmp_path / "out", SMALL) == first
    assert {path: os.stat(path).st_mtime_ns for path in times if path.name != ".lock"} == {
        path: time for path, time in times.items() if path.name != ".lock"
    }


def test_going_on_from_changed_sources_is_an_error(photos, tmp_path, png):
    make_shards([FolderSource(str(photos))], tmp_path / "out")
    (photos / "new.png").write_bytes(png(9))
    with pytest.raises(ValueError, match="begun from other sources"):
        make_shards([FolderSource(str(photos))], tmp_path / "out")


def test_going_on_with_another_caption_field_is_an_error(photos, tmp_path):
    make_shards([FolderSource(str(photos))], tmp_path / "out")
    with pytest.raises(ValueError, match=r"begun from other sources.*caption_field.*text"):
        make_shards([FolderSource(str(photos), "text")], tmp_path / "out")


def test_a_folder_of_foreign_tars_is_not_written_into(photos, tmp_path, write_shard, png):
    foreign = Path(write_shard("theirs/one.tar", [("a.png", png(0))]))
    with pytest.raises(ValueError, match=r"holds one\.tar, which no .* wrote"):
        make_shards([FolderSource(str(photos))], foreign.parent)


def test_two_makes_of_one_folder_do_not_run_at_once(photos, tmp_path):
    def again(_: object) -> None:
        make_shards([FolderSource(str(photos))], tmp_path / "out")

    with pytest.raises(ValueError, match="being written by another"):
        make_shards([FolderSource(str(photos))], tmp_path / "out", on_progress=again)


@pytest.mark.multi
def test_several_processes_write_what_one_writes(photos, tmp_path):
    options = MakeOptions(shard_images=2, processes=2)
    make_shards([FolderSource(str(photos))], tmp_path / "two", options)
    make_shards([FolderSource(str(photos))], tmp_path / "one", SMALL)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert (tmp_path / "two/quarantine.jsonl").read_bytes() == (
        tmp_path / "one/quarantine.jsonl"
    ).read_bytes()


class KillsItsProcess(bytes):
    """An image at whose sight a decoder dies."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.multi
def test_an_image_that_kills_the_decoder_is_rejected_and_the_others_come_through(png):
    images = [KillsItsProcess(), png(2)]
    items = [Item(str(n), str(n), image) for n, image in enumerate(images)]
    found = list(inspect_all(items, Limits(), processes=2, keep_data=True))
    assert [(entry.reason, entry.data) for entry in found if isinstance(entry, Inspected)] == [
        ("decoding it killed the process", b""),
        (None, png(2)),
    ]


def test_every_bad_member_of_a_tar_is_accounted_for_and_the_good_ones_are_kept(tmp_path, png):
    path = tmp_path / "wild.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("train/a.png", png(0)),
            ("train/a.txt", b"in a folder"),
            ("../evil.png", png(1)),
            ("a\nb.png", png(2)),
            ("c.png", png(3)),
            ("c.jpg", png(4)),
            ("c.png", png(5)),
            ("inner.tar", b"\0" * 1024),
            ("empty.png", b""),
            ("._c.png", b"mac"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    done = make_shards([TarSource(str(path), Limits())], tmp_path / "out")
    assert opened(tmp_path / "out") == {
        "train_a": (png(0), "in a folder"),
        "evil": (png(1), None),
        "a_b": (png(2), None),
        "c": (png(3), None),
    }
    assert not (tmp_path / "evil.png").exists()
    rows = [json.loads(row) for row in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    found = sorted((row["sample"].removeprefix(f"{path}: "), row["reason"]) for row in rows)
    assert found == [
        ("c.jpg", "a second image of this key"),
        ("c.png", "a second member of this name"),
        ("empty.png", "the file is empty"),
        ("inner.tar", "no image (jpg, jpeg, png, webp) of key 'inner'"),
        ("link.png", "a link, device or sparse file"),
    ]
    assert done.rejected == 5


@pytest.mark.parametrize("length", [600, 1600, 2560])
def test_what_stands_before_the_damage_of_a_torn_tar_is_kept(write_shard, png, tmp_path, length):
    path = Path(write_shard("torn.tar", [(f"{n}.png", png(n)) for n in range(3)]))
    path.write_bytes(path.read_bytes()[:length])
    done = make_shards([TarSource(str(path), Limits())], tmp_path / "out")
    assert done.images == length // 1024
    assert any("torn or damaged" in reason for reason in quarantine(tmp_path / "out").values())


def test_a_tar_header_that_claims_gigabytes_is_damage_not_memory(tmp_path, png):
    path = tmp_path / "bomb.tar"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 6 << 30
    with open(path, "wb") as file:
        file.write(info.tobuf())
        file.truncate(7 << 30)  # sparse
    reasons = [row.reason for row in TarSource(str(path), Limits()).items()]  # type: ignore[union-attr]
    assert len(reasons) == 1
    assert "more than the limit" in reasons[0]


def test_limits_on_pixels_bytes_captions_and_members_reject_with_the_number(write_shard, png, tmp_path):
    members = [("a.png", png(0)), ("b.png", encode(noise_image(1, 40))), ("c.png", png(2))]
    members += [("c.txt", b"x" * 30), ("d.png", encode(noise_image(3, 12)))]
    limits = Limits(max_pixels=100, max_image_bytes=2000, max_caption_bytes=20, max_members=5)
    path = write_shard("in.tar", [*members, ("e.png", png(5))])
    make_shards([TarSource(path, limits)], tmp_path / "out", MakeOptions(limits=limits))
    reasons = quarantine(tmp_path / "out")
    assert "more than the limit of 2000" in reasons["in.tar: b.png"]
    assert "more than the limit of 20" in reasons["in.tar: c.png"]
    assert "more than the limit of 100 px" in reasons["in.tar: d.png"]
    assert "more than 5 members" in reasons["in.tar"]
    assert set(opened(tmp_path / "out")) == {"a", "c"}


def test_a_parquet_file_with_image_bytes_becomes_shards(tmp_path, png):
    import pyarrow as pa
    from pyarrow import parquet

    plain = pa.table({"image": [png(0), None, png(1)], "caption": ["one", "two", None]})
    parquet.write_table(plain, tmp_path / "plain.parquet")
    records = pa.table({"img": [{"bytes": png(2), "path": "x.png"}], "caption": ["three"]})
    parquet.write_table(records, tmp_path / "hub.parquet")
    sources = [
        ParquetSource(str(tmp_path / "plain.parquet")),
        ParquetSource(str(tmp_path / "hub.parquet"), image_column="img"),
    ]
    done = make_shards(sources, tmp_path / "out")
    assert opened(tmp_path / "out") == {
        "plain_00000000": (png(0), "one"),
        "plain_00000002": (png(1), None),
        "hub_00000000": (png(2), "three"),
    }
    assert done.rejected == 1
    with pytest.raises(ValueError, match="has the columns img, caption, none named 'image'"):
        list(ParquetSource(str(tmp_path / "hub.parquet")).items())


def test_a_damaged_parquet_file_is_rejected_with_its_reason(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    rejected = list(ParquetSource(str(tmp_path / "bad.parquet")).items())
    assert "a damaged Parquet file" in rejected[0].reason  # type: ignore[union-attr]


def test_parquet_without_pyarrow_is_an_error_that_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow\. Install it: pip install"):
        list(ParquetSource("x.parquet").items())


def test_sources_are_told_apart_and_anything_else_is_refused(photos, write_shard, png, tmp_path):
    tar = write_shard("in.tar", [("a.png", png(0))])
    (tmp_path / "t.parquet").write_bytes(b"")
    options = {"image_column": "image", "caption_field": "caption"}
    found = open_sources([str(photos), tar, str(tmp_path / "t.parquet")], Limits(), **options)
    assert [type(source) for source in found] == [FolderSource, TarSource, ParquetSource]
    (tmp_path / "odd.bin").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"odd\.bin is no folder, tar or Parquet file"):
        open_sources([str(tmp_path / "odd.bin")], Limits(), **options)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_sources([str(tmp_path / "nowhere")], Limits(), **options)


def test_keys_that_collide_in_one_shard_are_numbered(tmp_path, png):
    folder = tmp_path / "in"
    folder.mkdir()
    for n, name in enumerate(("a b.png", "a+b.png", "a_b.png")):
        (folder / name).write_bytes(png(n))
    make_shards([FolderSource(str(folder))], tmp_path / "out")
    assert set(opened(tmp_path / "out")) == {"a_b", "a_b-2", "a_b-3"}


@given(st.text(max_size=200))
def test_any_name_becomes_a_flat_short_key_without_a_dot(name):
    key = fit_key(name)
    assert key
    assert len(key) <= MAX_KEY
    assert len(f"{key}-10000.webp".encode()) <= 100
    assert not set(key) & set("./\\\n\0 ")
    assert fit_key(key) == key
