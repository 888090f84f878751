"""The planner's disk against the files that a run writes."""

from pathlib import Path

import pytest

from iomm.parallel.mesh import Mesh
from iomm.plan.caches import bytes_per_image, caches
from iomm.plan.workload import varied, workload
from iomm.presets import b
from iomm.training.encode import encode_shards
from tests.small_run import small_config

B = workload(b("b", ["x.tar"]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"codec__sample": True, "data__cache_precision": "bf16", "data__flip": True},
    ],
)
def test_the_planned_bytes_are_those_on_disk(world: Path, tmp_path: Path, mesh: Mesh, settings):
    config = small_config(world, tmp_path, data__cache_dir=str(tmp_path / "cache"), **settings)
    images = encode_shards(config).samples
    planned = bytes_per_image(workload(config))
    for encoder, size in planned.items():
        (part,) = (tmp_path / "cache").glob(f"{encoder}-*/part-*")
        header = 8 + int.from_bytes(part.read_bytes()[:8], "little")
        assert part.stat().st_size == header + images * size


def test_flips_sizes_of_a_progression_moments_and_precision_multiply_the_disk_of_the_b_preset():
    plain = bytes_per_image(B)
    assert plain["vae"] == 1024 * 64 * 4 + 32
    assert plain["vit"] == 256 * 1536 * 2 + 32
    assert bytes_per_image(varied(B, data__flip=True)) == {name: 2 * size for name, size in plain.items()}
    progression = bytes_per_image(varied(B, data__progression=((0, 256), (10, 512))))
    assert progression == {"vae": plain["vae"] * 5 // 4 - 8 + 32, "vit": 2 * plain["vit"]}
    halved = varied(B, data__cache_precision="bf16")
    assert bytes_per_image(halved) == {"vae": 1024 * 64 * 2 + 32, "vit": plain["vit"]}
    assert bytes_per_image(varied(halved, codec__sample=True))["vae"] == 2 * 1024 * 64 * 2 + 40


def test_the_table_names_what_this_plan_keeps_and_what_it_could():
    rows = {row[0]: row[1:] for row in caches(B, 11e6).rows}
    assert rows["latents: mean, fp32"] == ("256", "2.88", "not used")
    assert rows["ViT features"] == ("768", "8.65", "not used")
    assert rows["what this plan keeps"] == ("0", "0.00", "")
    kept = varied(B, cached=frozenset({"vae", "vit"}), codec__sample=True, data__cache_precision="bf16")
    rows = {row[0]: row[1:] for row in caches(kept, 11e6).rows}
    assert rows["latents: mean, fp32"][2] == "-"
    assert rows["latents: mean and log-variance, bf16"] == ("256", "2.88", "used")
    assert rows["what this plan keeps"] == ("1,024", "11.54", "")


def test_the_plan_counts_the_encoders_that_the_settings_cache_as_read_from_disk():
    config = b("b", ["x.tar"]).override(["data.cache_dir=features", "data.cache=vae"])
    assert workload(config).cached == {"vae"}
    assert workload(config.override(['data.cache=["vit", "vae"]'])).cached == {"vae", "vit"}
