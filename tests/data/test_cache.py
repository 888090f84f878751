import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from iomm.data import stores
from iomm.data.cache import FeatureCache, cache_key, feature_key
from iomm.data.feature_shards import Part

OUTPUTS = ("mean", "logvar")


def h(n: int) -> str:
    return feature_key(f"content {n}", "8x8")


def outputs(n: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((2, 3), float(n)), "logvar": torch.full((2, 4), n, dtype=torch.bfloat16)}


def opened(folder: Path, **options) -> FeatureCache:
    return FeatureCache(folder, "id", OUTPUTS, **options)


def filled(folder: Path, *numbers: int) -> FeatureCache:
    cache = opened(folder)
    cache.put({h(n): outputs(n) for n in numbers})
    cache.flush()
    return cache


def means(cache: FeatureCache, *numbers: int) -> list[float]:
    rows = cache.find([h(n) for n in numbers])
    return [float(rows[h(n)]["mean"].unique()) for n in numbers]


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "id").iterdir())


def never(places: list[int]) -> dict[str, torch.Tensor]:
    raise AssertionError(f"{places} were encoded")


def test_the_content_hash_is_the_first_half_of_the_sha256_of_the_bytes():
    assert cache_key(b"abc") == hashlib.sha256(b"abc").hexdigest()[:32]
    assert cache_key(b"abc") != cache_key(b"abd")


def test_another_image_and_another_view_have_other_keys():
    assert len({feature_key(c, v) for c in ("a", "b") for v in ("8x8", "8x8 flip", "16x8")}) == 6
    assert len(feature_key("a", "8x8")) == 32


def test_what_was_put_comes_back_also_after_flushing_and_after_opening_again(tmp_path):
    first = opened(tmp_path)
    first.put({h(n): outputs(n) for n in (1, 2, 3)})
    for cache in (first, filled(tmp_path, 1, 2, 3), opened(tmp_path)):
        rows = cache.find([h(3), h(1), h(9), h(3)])
        assert list(rows) == [h(3), h(1)]
        assert torch.equal(rows[h(3)]["mean"], torch.full((2, 3), 3.0))
        assert torch.equal(rows[h(1)]["logvar"], torch.ones(2, 4, dtype=torch.bfloat16))
        assert len(cache) == 3


def test_missing_names_each_unknown_key_once_in_order(tmp_path):
    assert filled(tmp_path, 1).missing([h(8), h(1), h(9), h(8)]) == [h(8), h(9)]


def test_get_encodes_what_is_not_here_one_by_one_and_keeps_it(tmp_path):
    cache, asked = filled(tmp_path, 1), list[list[int]]()

    def encode(places: list[int]) -> dict[str, torch.Tensor]:
        asked.append(places)
        return {name: value[None].expand(len(places), -1, -1) for name, value in outputs(7).items()}

    keys = [h(5), h(1), h(6), h(5)]
    for call in (encode, never):
        found = cache.get(keys, call)
        assert found["mean"][:, 0, 0].tolist() == [7.0, 1.0, 7.0, 7.0]
        assert found["logvar"].shape == (4, 2, 4)
    assert asked == [[0], [2]]
    assert cache.get([h(n) for n in (2, 1, 3, 4)], encode, at_once=2)["mean"].shape == (4, 2, 3)
    assert asked[2:] == [[0, 2], [3]]
    cache.flush()
    opened(tmp_path).get([*keys, h(2), h(3), h(4)], never)


def test_several_flushes_add_parts_and_a_flush_with_nothing_new_writes_none(tmp_path):
    cache = filled(tmp_path, 1)
    cache.put({h(1): outputs(9), h(2): outputs(2)})
    assert cache.flush() is not None
    assert cache.flush() is None
    assert len(parts(tmp_path)) == 2
    assert means(opened(tmp_path), 1, 2) == [1.0, 2.0]


def test_a_full_part_is_written_before_more_is_taken_in(tmp_path):
    cache = opened(tmp_path, part_bytes=100)  # two rows of 40 bytes are less, three more
    for n in range(7):
        cache.put({h(n): outputs(n)})
    assert len(parts(tmp_path)) == 2
    assert means(cache, *range(7)) == [*range(7)]
    assert opened(tmp_path).missing([h(n) for n in range(7)]) == [h(6)]


def test_a_later_change_of_the_tensor_given_or_got_does_not_reach_the_cache(tmp_path):
    cache, mine = FeatureCache(tmp_path, "id", ["mean"]), torch.ones(1, 2, requires_grad=True)
    cache.put({h(1): {"mean": mine}})
    with torch.no_grad():
        mine.zero_()
    cache.get([h(1)], never)["mean"].zero_()
    assert cache.get([h(1)], never)["mean"].tolist() == [[[1.0, 1.0]]]
    assert not cache.get([h(1)], never)["mean"].requires_grad


def test_values_are_rounded_to_the_dtype_of_the_cache_before_anybody_sees_them(tmp_path):
    cache = FeatureCache(tmp_path, "id", ["mean"], dtype=torch.bfloat16)
    exact = torch.randn(2, 3).T
    first = cache.get([h(1)], lambda _: {"mean": exact[None]})["mean"]
    cache.flush()
    again = FeatureCache(tmp_path, "id", ["mean"], dtype=torch.bfloat16).get([h(1)], never)["mean"]
    assert torch.equal(first, again)
    assert torch.equal(first[0], exact.bfloat16())


def test_identities_do_not_see_each_other(tmp_path):
    filled(tmp_path, 1)
    assert FeatureCache(tmp_path, "other", OUTPUTS).missing([h(1)]) == [h(1)]


@pytest.mark.parametrize("identity", ["", "a/b", "..", ".hidden", "a b"])
def test_an_identity_that_is_no_plain_folder_name_is_an_error(tmp_path, identity):
    with pytest.raises(ValueError, match="must be a plain folder name"):
        FeatureCache(tmp_path, identity, OUTPUTS)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_in_an_object_store_is_an_error():
    with pytest.raises(ValueError, match="Set data.cache_dir to a folder"):
        FeatureCache("s3://bucket/cache", "id", OUTPUTS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "other",
    [
        {"mean": torch.zeros(2, 3)},
        {"mean": torch.zeros(2, 5), "logvar": torch.zeros(2, 4, dtype=torch.bfloat16)},
        {"mean": torch.zeros(2, 3), "logvar": torch.zeros(2, 4)},
    ],
)
def test_other_names_numbers_or_dtypes_are_an_error_and_nothing_of_the_call_is_added(tmp_path, other):
    cache = filled(tmp_path, 1)
    with pytest.raises(ValueError, match="has outputs .* the others logvar"):
        cache.put({h(2): outputs(2), h(3): other})
    assert cache.missing([h(2), h(3)]) == [h(2), h(3)]
    assert cache.flush() is None


def test_rows_of_another_number_of_tokens_are_kept_beside_each_other(tmp_path):
    cache = filled(tmp_path, 1)
    cache.put({h(2): {name: value.repeat(3, 1) for name, value in outputs(2).items()}})
    cache.flush()
    assert [len(row["mean"]) for row in opened(tmp_path).find([h(1), h(2)]).values()] == [2, 6]


def test_parts_that_lack_a_wanted_output_count_as_absent_and_those_that_have_more_serve(tmp_path):
    filled(tmp_path, 1)
    few = FeatureCache(tmp_path, "id", ["mean"])
    assert few.get([h(1)], never)["mean"].shape == (1, 2, 3)
    few.put({h(2): {"mean": torch.zeros(2, 3)}})
    few.flush()
    assert opened(tmp_path).missing([h(1), h(2)]) == [h(2)]
    assert FeatureCache(tmp_path, "id", ["mean"]).missing([h(1), h(2)]) == []


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:200], lambda data: data[:-1], lambda _: b"", lambda data: b"\xff" * len(data)],
)
def test_a_torn_part_is_left_out_with_a_warning_and_can_be_made_again(tmp_path, caplog, damage):
    filled(tmp_path, 1, 2)
    torn = parts(tmp_path)[0]
    filled(tmp_path, 3)
    torn.write_bytes(damage(torn.read_bytes()))
    with caplog.at_level(logging.WARNING):
        cache = opened(tmp_path)
    assert cache.missing([h(1), h(2), h(3)]) == [h(1), h(2)]
    assert str(torn) in caplog.text
    cache.put({h(1): outputs(1), h(2): outputs(2)})
    cache.flush()
    assert means(opened(tmp_path), 1, 2, 3) == [1.0, 2.0, 3.0]


def test_a_damaged_row_is_encoded_again_with_a_warning_and_later_found_in_the_newer_part(tmp_path, caplog):
    filled(tmp_path, 1, 2)
    path = parts(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for again in (False, True):
        cache = opened(tmp_path)
        assert means(cache, 1) == [1.0]
        found = cache.get([h(2)], never if again else lambda _: {k: v[None] for k, v in outputs(2).items()})
        assert float(found["mean"].unique()) == 2.0
        cache.flush()
        assert "row 1 of" in caplog.text
        assert "does not match its checksum" in caplog.text
    assert len(parts(tmp_path)) == 2


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_flush_that_fails_leaves_no_file_and_keeps_the_rows_for_the_next_one(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    cache.put({h(1): outputs(1)})
    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert parts(tmp_path) == []
    assert cache.missing([h(1)]) == []
    cache.flush()
    assert opened(tmp_path).missing([h(1)]) == []


def test_rows_that_fill_a_part_which_cannot_be_written_are_given_up_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    cache = opened(tmp_path, part_bytes=1)
    cache.put({h(1): outputs(1)})
    monkeypatch.setattr(stores.os, "fsync", full)
    found = cache.get([h(2)], lambda _: {k: v[None] for k, v in outputs(2).items()})
    assert float(found["mean"].unique()) == 2.0
    assert cache.missing([h(1), h(2)]) == [h(1)]
    assert "its 1 samples will be encoded again" in caplog.text
    assert parts(tmp_path) == []


def test_a_draft_left_by_a_killed_writer_is_not_read(tmp_path):
    filled(tmp_path, 1)
    part = parts(tmp_path)[0]
    part.rename(part.with_name(f"{part.name}.{os.getpid()}.part"))
    assert len(opened(tmp_path)) == 0


def test_an_open_reader_sees_what_another_wrote_once_it_refreshes(tmp_path):
    reader = opened(tmp_path)
    filled(tmp_path, 5)
    assert reader.missing([h(5)]) == [h(5)]
    reader.refresh()
    assert means(reader, 5) == [5.0]


def test_two_writers_of_the_same_and_of_other_rows_do_not_disturb_each_other(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    for cache in (one, two):
        cache.put({h(1): outputs(1), h(2): outputs(2)})
        cache.flush()
    two.put({h(3): outputs(3)})
    two.flush()
    one.refresh()
    assert one.missing([h(1), h(2), h(3)]) == []
    assert len(opened(tmp_path)) == 3


def test_rows_that_were_read_ahead_are_not_read_again_and_those_put_meanwhile_are_found(
    tmp_path, monkeypatch
):
    filled(tmp_path, 1, 2)
    cache, read = opened(tmp_path), list[int]()
    original = Part.read
    monkeypatch.setattr(
        Part, "read", lambda part, n, outputs: (read.append(n), original(part, n, outputs))[1]
    )
    for n in (1, 2, 3, 3):
        cache.read_ahead(h(n))
    cache.put({h(3): outputs(3)})
    assert means(cache, 1, 2, 3) == [1.0, 2.0, 3.0]
    assert sorted(read) == [0, 1]
    assert means(cache, 1) == [1.0]
    assert sorted(read) == [0, 0, 1]


def test_threads_that_read_ahead_while_parts_are_added_disturb_nothing(tmp_path):
    cache = opened(tmp_path, part_bytes=200)

    def ask() -> None:
        for n in range(60):
            cache.read_ahead(h(n))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for n in range(60):
        cache.get([h(n)], lambda _, n=n: {name: value[None] for name, value in outputs(n).items()})
    for thread in asking:
        thread.join()
    assert means(cache, *range(60)) == [*range(60)]
