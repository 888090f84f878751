"""The feature cache filled beforehand: what training then finds there, and that it changes nothing."""

import dataclasses
import functools
import io
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from iomm.checkpoint.generator import open_generator
from iomm.cli import main
from iomm.config import Config
from iomm.data.cache import FeatureCache
from iomm.data.indexer import index_shard
from iomm.data.shards import ShardSet
from iomm.encoders import Encoders
from iomm.parallel.mesh import Mesh
from iomm.training import encode
from iomm.training.encode import encode_shards
from iomm.training.train import train
from tests.small_run import config_file, losses, small_config, write_shard

SHORT = {"train__steps": 2, "data__heldout": []}
SAMPLES = 40  # of the small run's images; 20 of them serve as pairs too


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call of the autoencoder."""
    from iomm.autoencoder import LatentCodec

    calls: list[int] = []
    original = LatentCodec.moments

    def moments(self: LatentCodec, image_BCHW):
        calls.append(len(image_BCHW))
        return original(self, image_BCHW)

    monkeypatch.setattr(LatentCodec, "moments", moments)
    return calls


def cached(world: Path, tmp_path: Path, name: str = "run", **settings) -> Config:
    return small_config(world, tmp_path, name, data__cache_dir=str(tmp_path / "cache"), **settings)


def parts(tmp_path: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (tmp_path / "cache").rglob("part-*")}


def test_training_on_what_was_encoded_beforehand_encodes_nothing_and_gives_the_same_curve(
    world: Path, tmp_path: Path, mesh: Mesh, encoded: list[int]
):
    plain = small_config(world, tmp_path, "plain", data__mix_ratio=0.5, train__steps=6)
    train(plain)
    config = cached(world, tmp_path, data__mix_ratio=0.5, train__steps=6)
    tally = encode_shards(config)
    assert (tally.samples, tally.encoded, tally.bad) == (SAMPLES + 20, SAMPLES, ())
    before = parts(tmp_path)
    encoded.clear()
    train(config)
    assert losses(config.run_dir) == pytest.approx(losses(plain.run_dir), rel=1e-4)
    assert sum(encoded) == 8 + 1  # the held-out images, and the count of FLOPs
    assert parts(tmp_path).items() >= before.items()
    _, opened, _ = open_generator(config.run_dir, ema=True)
    assert not opened.caches  # a generator needs none, and may be on another machine


def test_a_cache_in_bf16_is_half_as_large_and_hardly_changes_the_curve(
    world: Path, tmp_path: Path, mesh: Mesh
):
    found = {}
    for precision in ("exact", "bf16"):
        settings = {"data__cache_precision": precision, "data__cache": ["vae"], **SHORT}
        config = cached(world, tmp_path / precision, precision, **settings)
        encode_shards(config)
        found[precision] = losses(train(config).run_dir), sum(map(len, parts(tmp_path / precision).values()))
    assert found["bf16"][0] == pytest.approx(found["exact"][0], rel=1e-3)
    assert found["bf16"][0] != found["exact"][0]
    assert found["bf16"][1] == pytest.approx(found["exact"][1] / 2, rel=0.1)


def test_drawn_latents_come_from_the_cache_too_and_are_drawn_anew_by_sample_index(
    world: Path, tmp_path: Path, mesh: Mesh
):
    drawn = small_config(world, tmp_path, "drawn", codec__sample=True, **SHORT)
    config = cached(world, tmp_path, codec__sample=True, **SHORT)
    mean = small_config(world, tmp_path, "mean", **SHORT)
    encode_shards(config)
    curves = [losses(train(run).run_dir) for run in (config, drawn, mean)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[1] != pytest.approx(curves[2], rel=1e-4)


def test_it_goes_on_where_it_was_stopped_and_with_an_index_reads_only_what_is_left(
    world: Path, tmp_path: Path, mesh: Mesh, encoded: list[int], monkeypatch: pytest.MonkeyPatch
):
    shard = str(shutil.copy(world / "train.tar", tmp_path / "train.tar"))
    index_shard(shard)
    config = cached(world, tmp_path, data__images=[shard], data__flip=True)

    def stop_after_two(done: int, of: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_shards(config, stretch=8, on_progress=stop_after_two)
    assert sum(encoded) == 2 * 16
    encoded.clear()
    assert encode_shards(config).encoded == 2 * SAMPLES - 2 * 16 == sum(encoded)
    monkeypatch.setattr(ShardSet, "read_image", None)  # nothing is left to read
    assert encode_shards(config).encoded == 0


def test_with_buckets_flips_and_a_progression_the_views_of_the_final_size_are_there_and_others_are_added(
    world: Path, tmp_path: Path, mesh: Mesh, encoded: list[int]
):
    def png(i: int) -> bytes:
        file = io.BytesIO()
        size = ((32, 32), (64, 16))[i % 2]
        Image.new("RGB", size, (8 * i, 99, 255 - 8 * i)).save(file, "PNG")
        return file.getvalue()

    shard = str(write_shard(tmp_path / "shapes.tar", [(f"{i}.png", png(i)) for i in range(16)]))
    index_shard(shard)
    settings = {"data__images": [shard], "data__buckets": True, "data__flip": True}
    assert encode_shards(cached(world, tmp_path, **settings)).encoded == 2 * 16
    encoded.clear()
    settings |= {"train__steps": 4, "data__heldout": []}
    final = train(cached(world, tmp_path, "final", **settings))
    assert len(losses(final.run_dir)) == 4
    assert encoded == [1, 1]  # the count of FLOPs at each of the two sizes
    encoded.clear()
    train(cached(world, tmp_path, "growing", **settings, data__progression=[[0, 16], [2, 32]]))
    assert 2 * 8 <= sum(encoded) <= 2 * 8 + 4  # two steps at the smaller size


def test_several_ranks_share_the_work_and_one_rank_goes_on(
    world: Path, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
):
    config = cached(world, tmp_path)
    for rank, count in ((0, 24), (1, 16)):
        one_of_two = dataclasses.replace(mesh, rank=rank, world_size=2)
        with monkeypatch.context() as patch:
            patch.setattr(encode, "start", lambda _, mine=one_of_two: mine)
            assert encode_shards(config, stretch=8).encoded == count
    for identity in (tmp_path / "cache").iterdir():
        outputs = ["mean"] if identity.name.startswith("vae") else ["patches"]
        assert len(FeatureCache(tmp_path / "cache", identity.name, outputs)) == SAMPLES
        assert len(list(identity.iterdir())) == 2
    assert encode_shards(config).encoded == 0


def test_the_command_prints_what_it_did_and_names_bad_samples(
    world: Path, tmp_path: Path, mesh: Mesh, capsys: pytest.CaptureFixture[str]
):
    good = (world / "train.tar").read_bytes()
    shard = tmp_path / "some.tar"
    shard.write_bytes(good)
    bad = write_shard(tmp_path / "bad.tar", [("x.png", b"<html>")])
    config = cached(world, tmp_path, data__images=[str(shard), str(bad)])
    assert main(["shard", "encode", str(config_file(config, tmp_path / "config.py"))]) == 0
    printed = capsys.readouterr().out
    assert f"{SAMPLES} images encoded in 0.0 min, of {SAMPLES + 1} samples" in printed
    assert "bad.tar: sample 'x' skipped" in printed
    plain = config_file(small_config(world, tmp_path), tmp_path / "plain.py")
    assert main(["shard", "encode", str(plain)]) == 1
    assert "data.cache_dir is null" in capsys.readouterr().err


def test_a_command_that_is_told_to_stop_writes_what_it_encoded(
    world: Path, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
):
    @contextmanager
    def stopping(*_: object, **__: object):
        yield lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(encode, "bar", stopping)
    monkeypatch.setattr(encode, "encode_shards", functools.partial(encode_shards, stretch=24))
    before, config = signal.getsignal(signal.SIGTERM), cached(world, tmp_path)
    assert main(["shard", "encode", str(config_file(config, tmp_path / "config.py"))]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert encode_shards(config).encoded == SAMPLES - 24


def test_a_cache_lasts_as_long_as_its_own_encoder_does_not_change(world: Path, tmp_path: Path, mesh: Mesh):
    def names(config: Config) -> set[str]:
        return {cache.folder.name for cache in Encoders(config, mesh.device).caches.values()}

    one, other = names(cached(world, tmp_path)), names(cached(world, tmp_path, train__precision="fp64"))
    assert not one & other
    shrunk = names(cached(world, tmp_path, data__image_px=16))
    assert shrunk == one  # the size is part of a row's key
    assert len(names(cached(world, tmp_path, data__cache="vae"))) == 1
