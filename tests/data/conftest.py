import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = Sequence[tuple[str, bytes]]


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
