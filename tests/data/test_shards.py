import io
import logging
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from iomm.data import shards as shards_module
from iomm.data.errors import BadSample
from iomm.data.shards import ShardSet

THREE = [
    ("a.webp", b"image a"),
    ("a.json", b"{}"),
    ("a.txt", "  ein Café \n".encode()),
    ("b.jpg", b"image b, longer"),
    ("c.txt", b"see"),
    ("c.png", b"image c"),
]


def keys(shards: ShardSet) -> list[str]:
    return [shards[i].key for i in range(len(shards))]


def test_images_and_captions_come_back_as_they_were_packed(write_shard):
    shards = ShardSet.open([write_shard("one.tar", THREE)])
    assert keys(shards) == ["a", "b", "c"]
    assert [shards.image_bytes(i) for i in range(3)] == [b"image a", b"image b, longer", b"image c"]
    assert [shards.caption(i) for i in range(3)] == ["ein Café", None, "see"]


def test_captioned_only_leaves_out_samples_without_a_caption(write_shard):
    assert keys(ShardSet.open([write_shard("one.tar", THREE)], captioned_only=True)) == ["a", "c"]


def test_globs_expand_in_sorted_order_and_patterns_keep_theirs(write_shard, tmp_path):
    for name in ("s-2.tar", "s-0.tar", "s-1.tar", "first.tar"):
        write_shard(name, [(f"{name[:-4]}.png", b"x")])
    shards = ShardSet.open([str(tmp_path / "s-*.tar"), str(tmp_path / "first.tar")])
    assert keys(shards) == ["s-0", "s-1", "s-2", "first"]


def test_a_path_with_glob_characters_in_it_is_taken_as_it_is(write_shard):
    assert keys(ShardSet.open([write_shard("odd[1].tar", [("a.png", b"x")])])) == ["a"]


def test_the_first_image_of_a_key_is_its_image_and_longer_suffixes_are_not(write_shard):
    members = [("a.depth.png", b"depth"), ("a.PNG", b"first"), ("a.jpg", b"second")]
    shards = ShardSet.open([write_shard("one.tar", members)])
    assert shards.image_bytes(0) == b"first"


def test_names_with_a_leading_dot_slash_folders_and_hidden_files_are_no_obstacle(tmp_path):
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo(".")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./._a.png", "./a.png", "./" + "k" * 150 + ".png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert keys(ShardSet.open([str(path)])) == ["a", "k" * 150]


def test_keys_without_an_image_are_left_out_with_a_warning(write_shard, caplog):
    path = write_shard("one.tar", [("a.png", b"x"), ("b.avif", b"y"), ("b.txt", b"lost")])
    with caplog.at_level(logging.WARNING):
        assert keys(ShardSet.open([path])) == ["a"]
    assert "1 keys without an image left out, such as 'b'" in caplog.text


@pytest.mark.parametrize("pattern", ["missing.tar", "missing-*.tar"])
def test_a_pattern_that_names_no_shard_is_an_error_that_repeats_it(tmp_path, pattern):
    with pytest.raises(
        FileNotFoundError, match=r"no shard matches .*missing.* must name at least one tar file"
    ):
        ShardSet.open([str(tmp_path / pattern)])


def test_a_shard_named_by_two_patterns_is_an_error(write_shard, tmp_path):
    path = write_shard("one.tar", THREE)
    with pytest.raises(ValueError, match="named twice"):
        ShardSet.open([path, str(tmp_path / "*.tar")])


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"\x1f\x8b" + b"z" * 2000])
def test_a_file_that_is_no_tar_is_an_error_that_names_it(tmp_path, data):
    path = tmp_path / "fake.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"fake\.tar: not a tar file at offset 0"):
        ShardSet.open([str(path)])


@pytest.mark.parametrize("length", [700, 1024, 1100, 1536, 2048, 3000, 3584])
def test_a_shard_cut_anywhere_before_its_end_marker_is_an_error_with_the_offset(write_shard, length):
    path = Path(write_shard("one.tar", [(f"{key}.png", b"x" * 600) for key in "abc"]))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"one\.tar: torn or damaged at offset \d+"):
        ShardSet.open([str(path)])


def test_a_damaged_header_in_the_middle_is_an_error_with_its_offset(write_shard):
    path = Path(write_shard("one.tar", [("a.png", b"x"), ("b.png", b"y")]))
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="torn or damaged at offset 1024"):
        ShardSet.open([str(path)])


def test_a_second_archive_behind_the_first_is_an_error(write_shard):
    path = Path(write_shard("one.tar", [("a.png", b"x")]))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="torn or damaged at offset 1024"):
        ShardSet.open([str(path)])


def test_a_member_in_a_folder_is_an_error_that_names_it(write_shard):
    with pytest.raises(ValueError, match=r"member 'train/a\.png' lies in a folder"):
        ShardSet.open([write_shard("one.tar", [("train/a.png", b"x")])])


def test_a_path_out_of_the_shard_is_an_error_and_nothing_is_written(write_shard, tmp_path):
    with pytest.raises(ValueError, match="lies in a folder"):
        ShardSet.open([write_shard("in/one.tar", [("../evil.png", b"x")])])
    assert not (tmp_path / "evil.png").exists()


def test_a_link_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/somewhere/else.png"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"'a\.png' is a link"):
        ShardSet.open([str(path)])


@pytest.mark.parametrize(
    "names", [["a.png", "a.png"], ["a.png", "b.png", "a.txt"], ["a.txt", "b.png", "a.txt"]]
)
def test_a_key_that_comes_twice_is_an_error_that_names_it(write_shard, names):
    with pytest.raises(ValueError, match="key 'a' comes twice"):
        ShardSet.open([write_shard("one.tar", [(name, b"x") for name in names])])


def test_one_key_may_stand_in_two_shards(write_shard):
    paths = [write_shard(f"{n}.tar", [("0000.png", str(n).encode())]) for n in range(2)]
    shards = ShardSet.open(paths)
    assert [shards.image_bytes(i) for i in range(2)] == [b"0", b"1"]


def test_shards_with_nothing_to_use_are_an_error_that_says_why(write_shard):
    with pytest.raises(ValueError, match="hold no image"):
        ShardSet.open([write_shard("none.tar", [])])
    with pytest.raises(ValueError, match="hold 1 images, none with a caption"):
        ShardSet.open([write_shard("one.tar", [("a.png", b"x")])], captioned_only=True)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"caf\xe9", "not UTF-8: byte 3 is 0xe9"), (b" \n", "caption is empty")]
)
def test_a_caption_that_cannot_be_used_is_a_bad_sample(write_shard, data, reason):
    shards = ShardSet.open([write_shard("one.tar", [("a.png", b"x"), ("a.txt", data)])])
    with pytest.raises(BadSample, match=reason):
        shards.caption(0)


def test_a_shard_that_shrinks_while_in_use_is_an_error(write_shard):
    path = Path(write_shard("one.tar", [("a.png", b"x" * 2000)]))
    shards = ShardSet.open([str(path)])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="was changed while in use"):
        shards.image_bytes(0)


def test_threads_read_what_one_reader_reads_even_with_few_open_shards(write_shard, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_SHARDS", 2)
    paths = [write_shard(f"{n}.tar", [(f"{n}.png", bytes([n]) * 5000)]) for n in range(6)]
    shards = ShardSet.open(paths)
    barrier = threading.Barrier(4)

    def read(_: int) -> list[bytes]:
        barrier.wait(timeout=10)
        return [shards.image_bytes(i) for i in range(6)] * 3

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read, range(4)):
            assert found == [bytes([n]) * 5000 for n in range(6)] * 3
