import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iomm.config import DataConfig
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader

Members = Sequence[tuple[str, bytes]]
KEYS = "abcdefg"  # samples of `shard`, of which the first three have captions


def encode(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def noise_image(seed: int, side_px: int = 8) -> Image.Image:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[[str, Members], str]:
    """Write `(member name, bytes)` as one tar in tmp_path; its path."""

    def write(name: str, members: Members) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(path)

    return write


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """A small PNG that differs from one number to the next."""
    return lambda seed: encode(noise_image(seed))


@pytest.fixture
def shard(write_shard, png) -> str:
    members = [(f"{key}.png", png(seed)) for seed, key in enumerate(KEYS)]
    members[3:3] = [("c.txt", b"the third")]
    members[2:2] = [("b.txt", b"the second")]
    members[1:1] = [("a.txt", b"the first")]
    return write_shard("train.tar", members)


def never(report: BadSampleReport) -> None:
    raise AssertionError(report)


def loader(images: str, *, seed: int = 3, on_bad=never, **changes) -> Loader:
    settings_ = {"pairs": (images,), "mix_ratio": 0.5, "image_px": 8, "decode_threads": 2} | changes
    return Loader(DataConfig(images=(images,), **settings_), seed, on_bad=on_bad)


@pytest.fixture
def damaged(write_shard, png) -> str:
    good = {key: png(seed) for seed, key in enumerate(KEYS)}
    bad = {"b": good["b"][:60], "e": b"", "g": b"<html>"}
    return write_shard("damaged.tar", [(f"{key}.png", bad.get(key, good[key])) for key in KEYS])
