import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iomm.config import DataConfig
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader
from iomm_kernels import build, jpeg

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


@pytest.fixture(scope="module")
def compiled_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The JPEG decoder that `make kernels` built, or one built here; skips where it cannot be."""
    if jpeg.problem() is None:
        yield
        return
    if problem := build.JPEG.problem():
        pytest.skip(f"the compiled JPEG decoder cannot be built: the library {problem}")
    folder = tmp_path_factory.mktemp("jpeg")
    build.build(build.JPEG, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOMM_CSRC_DIR", str(folder))
        jpeg._load.cache_clear()
        assert jpeg.problem() is None, jpeg.problem()
    yield
    jpeg._load.cache_clear()


@pytest.fixture
def damaged(write_shard, png) -> str:
    good = {key: png(seed) for seed, key in enumerate(KEYS)}
    bad = {"b": good["b"][:60], "e": b"", "g": b"<html>"}
    return write_shard("damaged.tar", [(f"{key}.png", bad.get(key, good[key])) for key in KEYS])


def scene(seed: int, width_px: int, height_px: int, *, detail: float = 0.3) -> Image.Image:
    """A picture like a photograph: coarse colours, finer brightness, weaker the finer it is."""
    rng = np.random.default_rng(seed)
    total_HWC = np.zeros((height_px, width_px, 3), np.float32)
    for octave, share in enumerate((1.0, 0.6, detail, detail**2)):
        cells = (3 * 2**octave, 4 * 2**octave)
        for channel, weight in ((slice(0, 3), 1.0), (slice(0, 1), 0.2), (slice(2, 3), 0.2)):
            noise = Image.fromarray(rng.normal(0, 1, cells).astype(np.float32))
            smooth_HW = np.asarray(noise.resize((width_px, height_px), Image.Resampling.BICUBIC))
            total_HWC[..., channel] += share * weight * smooth_HW[..., None]
    return Image.fromarray(np.clip(total_HWC * 45 + 120, 0, 255).astype(np.uint8))


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 images."""
    mean_square = (a.double() - b.double()).square().mean().clamp_min(1e-9)
    return float(10 * torch.log10(255**2 / mean_square))
