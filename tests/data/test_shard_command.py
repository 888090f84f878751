import sys
from pathlib import Path

import pytest

from iomm.cli import main
from iomm.data.shards import ShardSet

ONE = ("--processes", "1")


@pytest.fixture
def photos(tmp_path, png) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png(n))
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


def test_make_prints_what_it_did_and_how_to_train_on_it(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["shard", "make", str(photos), "-o", str(out), "--shard-images", "2", *ONE]) == 0
    printed = capsys.readouterr().out
    assert "3 images, 0 with a caption, in 2 shards" in printed
    assert f"0 duplicates, 1 unusable; 0 images were kept without their caption. Reasons: {out}" in printed
    assert f"--set data.images={out}/set.index" in printed
    assert len(ShardSet.open([f"{out}/set.index"])) == 3
    assert main(["shard", "check", f"{out}/set.index", *ONE]) == 0
    assert main(["shard", "check", str(out), *ONE]) == 0
    assert capsys.readouterr().out.count(": ok\n") == 4


def test_make_by_path_is_the_same_command(photos, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    make_shards = __import__("make_shards")
    assert make_shards.main([str(photos), "-o", str(tmp_path / "out"), *ONE]) == 0
    del sys.modules["make_shards"]


def test_a_source_without_a_usable_image_fails(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["shard", "make", str(tmp_path / "empty"), "-o", str(tmp_path / "out"), *ONE]) == 1
    assert "no usable image" in capsys.readouterr().err


def test_index_takes_a_folder_and_merges(shard, damaged, tmp_path, capsys):
    out = f"{tmp_path}/set.index"
    assert main(["shard", "index", str(Path(shard).parent), "-o", out, *ONE]) == 0
    printed = capsys.readouterr().out
    assert f"{damaged}: indexed, 7 images, 3 of them unusable" in printed
    assert "  sample 'e': the file is empty\n" in printed
    assert f"{shard}: indexed, 7 images, 0 of them unusable" in printed
    assert len(ShardSet.open([out])) == 14
    assert main(["shard", "index", shard, *ONE]) == 0
    assert "the index fits" in capsys.readouterr().out


def test_a_damaged_shard_is_named_and_the_others_are_indexed(shard, tmp_path, capsys):
    (tmp_path / "fake.tar").write_bytes(b"no tar")
    assert main(["shard", "index", str(tmp_path), *ONE]) == 1
    captured = capsys.readouterr()
    assert "fake.tar: not a tar file at offset 0" in captured.err
    assert f"{shard}: indexed" in captured.out


def test_check_fails_and_says_what_is_wrong(shard, capsys):
    assert main(["shard", "check", shard, *ONE]) == 1
    assert "train.tar.index" in capsys.readouterr().out
    main(["shard", "index", shard, *ONE])
    with open(shard, "ab") as file:
        file.write(b"\0" * 512)
    assert main(["shard", "check", shard, *ONE]) == 1
    assert "the index is stale" in capsys.readouterr().out
