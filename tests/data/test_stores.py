import logging
from pathlib import Path

import fsspec
import pytest

from iomm.data import shards as shards_module
from iomm.data.index import Index
from iomm.data.indexer import check_shard, index_shard, merge_indexes
from iomm.data.inspection import Limits
from iomm.data.shards import ShardSet
from iomm.data.sources import TarSource
from iomm.data.stores import Stamp, join, open_reader, seen_from, stamp, stamps
from tests.data.conftest import KEYS


@pytest.fixture
def bucket(shard) -> str:
    """An object store with the shard in it, as bucket/train.tar."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pipe_file("/bucket/train.tar", Path(shard).read_bytes())
    return "memory://bucket"


def test_shards_in_a_store_are_read_as_local_ones_are(bucket, shard):
    local = ShardSet.open([shard])
    for pattern in (f"{bucket}/train.tar", f"{bucket}/*.tar"):
        remote = ShardSet.open([pattern])
        assert [remote[i].key for i in range(len(remote))] == list(KEYS)
        assert remote[0].shard.endswith("/bucket/train.tar")
        assert [remote.image_bytes(i) for i in range(7)] == [local.image_bytes(i) for i in range(7)]
        assert remote.caption(0) == "the first"


def test_the_index_of_a_shard_in_a_store_lies_beside_it_and_opens_without_a_scan(bucket, monkeypatch):
    assert index_shard(f"{bucket}/train.tar").renewed
    monkeypatch.setattr(shards_module, "scan", None)
    remote = ShardSet.open([f"{bucket}/*"])
    assert remote.indexed
    assert remote.image_bytes(2)
    assert remote.size_px(2) == (8, 8)
    assert check_shard(Index.open(f"{bucket}/train.tar.index"), 0) == []


def test_an_index_on_this_machine_may_list_shards_in_a_store(bucket, tmp_path):
    index_shard(f"{bucket}/train.tar")
    merge_indexes([f"{bucket}/train.tar.index"], str(tmp_path / "set.index"))
    assert ShardSet.open([str(tmp_path / "set.index")]).image_bytes(6)
    fsspec.filesystem("memory").pipe_file("/bucket/train.tar", b"shorter")
    with pytest.raises(ValueError, match="is stale"):
        ShardSet.open([str(tmp_path / "set.index")])


def test_shards_uploaded_with_their_indexes_are_taken_for_the_same_shards(bucket, shard):
    index_shard(shard)
    fsspec.filesystem("memory").pipe_file("/bucket/train.tar.index", Path(f"{shard}.index").read_bytes())
    assert ShardSet.open([f"{bucket}/train.tar"]).indexed


def test_a_tar_in_a_store_is_a_source_of_images(bucket):
    items = list(TarSource(f"{bucket}/train.tar", Limits()).items())
    assert [item.key for item in items] == list(KEYS)  # type: ignore[union-attr]


def test_a_name_that_a_store_does_not_have_is_an_error(bucket):
    for pattern in (f"{bucket}/none.tar", f"{bucket}/none-*.tar"):
        with pytest.raises(FileNotFoundError, match="no shard matches"):
            ShardSet.open([pattern])


def test_a_shard_in_a_store_that_is_named_twice_is_an_error(bucket):
    with pytest.raises(ValueError, match="named twice"):
        ShardSet.open([f"{bucket}/train.tar", f"{bucket}/*.tar"])


def test_an_object_that_became_shorter_is_an_error_of_the_store(bucket):
    remote = ShardSet.open([f"{bucket}/train.tar"])
    fsspec.filesystem("memory").pipe_file("/bucket/train.tar", b"x" * 700)
    with pytest.raises(OSError, match="changed while in use"):
        remote.image_bytes(6)


def test_what_a_client_raises_becomes_an_error_that_names_the_object(bucket, monkeypatch):
    reader = open_reader(f"{bucket}/train.tar")
    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match=r"train\.tar: reading bytes 3 to 8 failed: ZeroDivisionError"):
        reader.read(3, 5)


def test_a_store_without_its_client_or_of_no_known_kind_is_an_error_that_says_so(monkeypatch):
    with pytest.raises(ValueError, match=r"not installed .* pip install s3fs"):
        ShardSet.open(["s3://bucket/a.tar"])
    with pytest.raises(ValueError, match="named by their fsspec scheme"):
        ShardSet.open(["nosuch://bucket/a.tar"])


def test_stamps_leave_out_what_is_not_there(bucket, shard, tmp_path):
    paths = [shard, str(tmp_path / "none"), f"{bucket}/train.tar", f"{bucket}/none", "memory://other/x"]
    size = Path(shard).stat().st_size
    found = stamps(paths)
    assert set(found) == {shard, f"{bucket}/train.tar"}
    assert found[f"{bucket}/train.tar"] == Stamp(size, 0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        stamp(str(tmp_path / "none"))


def test_names_in_an_index_lead_back_to_the_shard():
    for folder, path in [
        ("/data/set", "/data/other/a.tar"),
        ("", "a.tar"),
        ("s3://b/set", "s3://b/set/a.tar"),
        ("s3://b/set", "gs://c/a.tar"),
        ("/data", "s3://b/a.tar"),
    ]:
        assert Path(join(folder, seen_from(folder, path))).resolve() == Path(path).resolve()
    with pytest.raises(ValueError, match="Upload both"):
        seen_from("s3://b", "/data/a.tar")


def test_a_large_scan_suggests_an_index_once(shard, monkeypatch, caplog):
    monkeypatch.setattr(shards_module, "_NOTICE_SAMPLES", 5)
    shards_module._suggest_index.cache_clear()
    with caplog.at_level(logging.WARNING):
        ShardSet.open([shard])
        ShardSet.open([shard])
    assert caplog.text.count(f"iomm shard index {Path(shard).parent}") == 1
