import hashlib
import logging
import os
from pathlib import Path

import pytest
import torch

from iomm.data import cache as cache_module
from iomm.data.cache import FeatureCache, cache_key


def outputs(n: int) -> dict[str, torch.Tensor]:
    return {"latent": torch.full((2, 3), float(n)), "features": torch.full((4,), n, dtype=torch.bfloat16)}


def filled(folder: Path, *numbers: int) -> FeatureCache:
    cache = FeatureCache(folder, "id")
    cache.put({f"h{n}": outputs(n) for n in numbers})
    cache.flush()
    return cache


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "id").iterdir())


def test_the_key_is_the_first_half_of_the_sha256_of_the_bytes():
    assert cache_key(b"abc") == hashlib.sha256(b"abc").hexdigest()[:32]
    assert cache_key(b"abc") != cache_key(b"abd")


def test_what_was_put_comes_back_stacked_in_the_order_asked_also_after_opening_again(tmp_path):
    for cache in (filled(tmp_path, 1, 2, 3), FeatureCache(tmp_path, "id")):
        got = cache.get(["h3", "h1", "h3"])
        assert torch.equal(got["latent"], torch.tensor([3.0, 1.0, 3.0])[:, None, None].expand(3, 2, 3))
        assert got["features"].dtype == torch.bfloat16
        assert got["features"].shape == (3, 4)
        assert len(cache) == 3


def test_missing_names_each_unknown_hash_once_in_order(tmp_path):
    assert filled(tmp_path, 1).missing(["x", "h1", "y", "x"]) == ["x", "y"]


def test_several_flushes_add_parts_and_a_flush_with_nothing_new_writes_none(tmp_path):
    cache = filled(tmp_path, 1)
    cache.put({"h1": outputs(9), "h2": outputs(2)})
    assert cache.flush() is not None
    assert cache.flush() is None
    assert len(parts(tmp_path)) == 2
    again = FeatureCache(tmp_path, "id")
    assert again.get(["h1", "h2"])["latent"][:, 0, 0].tolist() == [1.0, 2.0]


def test_a_later_change_of_the_tensor_given_or_got_does_not_reach_the_cache(tmp_path):
    cache, mine = FeatureCache(tmp_path, "id"), torch.ones(2, requires_grad=True)
    cache.put({"h": {"latent": mine}})
    with torch.no_grad():
        mine.zero_()
    cache.get(["h"])["latent"].zero_()
    assert cache.get(["h"])["latent"].tolist() == [[1.0, 1.0]]
    assert not cache.get(["h"])["latent"].requires_grad


def test_a_scalar_output_and_a_strided_one_are_kept(tmp_path):
    cache = FeatureCache(tmp_path, "id")
    cache.put({"h": {"norm": torch.tensor(3.0), "latent": torch.arange(6).reshape(2, 3).T}})
    cache.flush()
    got = FeatureCache(tmp_path, "id").get(["h"])
    assert got["norm"].tolist() == [3.0]
    assert got["latent"].tolist() == [[[0, 3], [1, 4], [2, 5]]]


def test_identities_do_not_see_each_other(tmp_path):
    filled(tmp_path, 1)
    assert FeatureCache(tmp_path, "other").missing(["h1"]) == ["h1"]


@pytest.mark.parametrize("identity", ["", "a/b", "..", ".hidden", "a b"])
def test_an_identity_that_is_no_plain_folder_name_is_an_error(tmp_path, identity):
    with pytest.raises(ValueError, match="must be a plain folder name"):
        FeatureCache(tmp_path, identity)
    assert list(tmp_path.iterdir()) == []


def test_asking_for_an_unknown_hash_or_for_none_is_an_error(tmp_path):
    cache = filled(tmp_path, 1)
    with pytest.raises(KeyError, match="1 of 2 samples are not in the feature cache .* such as h9"):
        cache.get(["h1", "h9"])
    with pytest.raises(ValueError, match="no content hash was given"):
        cache.get([])


@pytest.mark.parametrize(
    "other",
    [
        {"latent": torch.zeros(2, 3)},
        {"latent": torch.zeros(3, 2), "features": torch.zeros(4, dtype=torch.bfloat16)},
        {"latent": torch.zeros(2, 3), "features": torch.zeros(4)},
    ],
)
def test_other_names_shapes_or_dtypes_are_an_error_and_nothing_of_the_call_is_added(tmp_path, other):
    cache = filled(tmp_path, 1)
    with pytest.raises(ValueError, match="sample h3 has outputs .* the others features"):
        cache.put({"h2": outputs(2), "h3": other})
    assert cache.missing(["h2", "h3"]) == ["h2", "h3"]
    assert cache.flush() is None


def test_a_failed_put_into_an_empty_cache_leaves_it_open_for_another_layout(tmp_path):
    cache = FeatureCache(tmp_path, "id")
    with pytest.raises(ValueError, match="One identity has one layout"):
        cache.put({"h1": outputs(1), "h2": {"latent": torch.zeros(1)}})
    cache.put({"h2": {"latent": torch.zeros(1)}})
    assert cache.missing(["h1", "h2"]) == ["h1"]


def cut_short(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def zeros_at_the_end(data: bytes) -> bytes:
    return data[:-8] + bytes(8)


@pytest.mark.parametrize(
    "damage", [cut_short, zeros_at_the_end, lambda _: b"", lambda data: b"\xff" * len(data)]
)
def test_a_torn_part_is_left_out_with_a_warning_and_can_be_made_again(tmp_path, caplog, damage):
    filled(tmp_path, 1, 2)
    torn = parts(tmp_path)[0]
    filled(tmp_path, 3)
    torn.write_bytes(damage(torn.read_bytes()))
    with caplog.at_level(logging.WARNING):
        cache = FeatureCache(tmp_path, "id")
    assert cache.missing(["h1", "h2", "h3"]) == ["h1", "h2"]
    assert str(torn) in caplog.text
    cache.put({"h1": outputs(1), "h2": outputs(2)})
    cache.flush()
    assert FeatureCache(tmp_path, "id").missing(["h1", "h2", "h3"]) == []


def test_a_part_of_another_writer_without_a_checksum_is_not_trusted(tmp_path, caplog):
    from safetensors.torch import save_file

    (tmp_path / "id").mkdir()
    save_file({"latent": torch.zeros(1, 2)}, tmp_path / "id" / "part-0.safetensors")
    assert len(FeatureCache(tmp_path, "id")) == 0
    assert "torn or damaged" in caplog.text


def test_a_write_that_fails_leaves_no_file_and_keeps_the_samples_for_the_next_flush(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, "id")
    cache.put({"h1": outputs(1)})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert parts(tmp_path) == []
    assert cache.missing(["h1"]) == []
    cache.flush()
    assert FeatureCache(tmp_path, "id").missing(["h1"]) == []


def test_a_draft_left_by_a_killed_writer_is_not_read(tmp_path):
    filled(tmp_path, 1)
    part = parts(tmp_path)[0]
    part.rename(part.with_name(f".{part.name}.{os.getpid()}.tmp"))
    assert len(FeatureCache(tmp_path, "id")) == 0


def test_an_open_reader_sees_what_another_wrote_once_it_refreshes(tmp_path):
    reader = FeatureCache(tmp_path, "id")
    filled(tmp_path, 5)
    assert reader.missing(["h5"]) == ["h5"]
    reader.refresh()
    assert reader.get(["h5"])["latent"].unique().tolist() == [5.0]


def test_two_writers_of_the_same_and_of_other_samples_do_not_disturb_each_other(tmp_path):
    one, two = FeatureCache(tmp_path, "id"), FeatureCache(tmp_path, "id")
    one.put({"h1": outputs(1), "h2": outputs(2)})
    two.put({"h1": outputs(1), "h2": outputs(2)})
    one.flush()
    two.flush()
    two.put({"h3": outputs(3)})
    two.flush()
    one.refresh()
    assert one.missing(["h1", "h2", "h3"]) == []
    assert len(FeatureCache(tmp_path, "id")) == 3
