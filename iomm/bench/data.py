"""`iomm bench data`: images per second of one core, from tar shard to batch.

Ours, webdataset with Pillow, ours with DALI as the decoder, and a floor: libjpeg-turbo in C, which decodes
and averages areas and does nothing else. They take turns on the same synthetic JPEGs, so a slow moment of
the machine meets all of them. Time is processor time of all of a contestant's threads.
"""

import importlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from simplejpeg import encode_jpeg
from torch import Tensor

from iomm.config import DataConfig
from iomm.data.decoder import INSTALL_DALI, dali_installed
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader
from iomm.data.shards import ShardSet
from iomm.data.view import View

BATCH = 20
SIZES_PX = ((1024, 768), (2400, 1600))  # width, height
_JPEG_QUALITY = 90
_TEXTURES = 4  # distinct ones; the images are their shifts, mirrored or not, under fresh noise

Seconds = Callable[[int], float]  # processor seconds to turn that many further images into pixels


class NotHere(Exception):
    """A contestant that cannot be measured on this machine, and what it needs."""


@dataclass(frozen=True)
class Found:
    """Images per processor second of one contestant on one set: one figure a round, or why there is none."""

    rates: tuple[float, ...] = ()
    missing: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def bench_data(images: int, large_images: int, side_px: int, rounds: int) -> str:
    """Measure on `images` JPEGs of 1024 x 768 and `large_images` of 2400 x 1600: a table and a line of JSON.

    Raises:
        ValueError: fewer than one image a round.
    """
    if rounds < 1 or min(images, large_images) < rounds:
        raise ValueError(
            f"{images} and {large_images} images in {rounds} rounds: each round needs an image of each size."
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, dict[str, Found]] = {}
            for count, (width_px, height_px) in zip((images, large_images), SIZES_PX, strict=True):
                name = f"{width_px}x{height_px}"
                shard = write_shard(Path(folder) / f"{name}.tar", count, width_px, height_px)
                found[name] = _measure(shard, side_px, rounds)
    finally:
        torch.set_num_threads(threads)
    return _report(found, side_px)


def write_shard(path: Path, images: int, width_px: int, height_px: int) -> Path:
    """A tar of synthetic JPEGs, about as large as photographs are at this quality."""
    rng = np.random.default_rng(width_px)
    textures = [_texture(rng, width_px, height_px) for _ in range(_TEXTURES)]
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            shifts = (int(rng.integers(height_px)), int(rng.integers(width_px)))
            image_HWC = np.roll(textures[number % _TEXTURES], shifts, (0, 1))[:, :: 1 - 2 * (number % 2)]
            data = encode_jpeg(np.ascontiguousarray(image_HWC), _JPEG_QUALITY, "RGB", "420")
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _texture(rng: np.random.Generator, width_px: int, height_px: int) -> np.ndarray:
    """uint8 (H, W, 3): noise in octaves, the finer the weaker, mostly of brightness; as in photographs."""
    total_HWC = np.zeros((height_px, width_px, 3), np.float32)
    for octave in range(1, 9):
        cells_wh = (max(2, width_px >> octave), max(2, height_px >> octave))
        noise_hwC = rng.normal(0, 0.3, (*cells_wh[::-1], 3)) + rng.normal(0, 1, (*cells_wh[::-1], 1))
        for channel in range(3):
            plane = Image.fromarray(noise_hwC[..., channel].astype(np.float32))
            smooth_HW = np.asarray(plane.resize((width_px, height_px), Image.Resampling.BICUBIC))
            total_HWC[..., channel] += 2.0 ** (octave / 1.4) * smooth_HW
    total_HWC *= 45 / total_HWC.std()
    total_HWC += rng.normal(0, 3, (height_px, width_px, 1)) + 120
    return np.clip(total_HWC, 0, 255).astype(np.uint8)


def _measure(shard: Path, side_px: int, rounds: int) -> dict[str, Found]:
    """Every contestant over the shard, in turns."""
    images = len(ShardSet.open([str(shard)])) // rounds
    starters: dict[str, Callable[[], Seconds]] = {
        "ours": lambda: _ours(shard, side_px, "cpu"),
        "webdataset + Pillow": lambda: _webdataset(shard, side_px),
        "ours with DALI": lambda: _ours(shard, side_px, "dali"),
        "floor (C)": lambda: _floor(shard, side_px),
    }
    contestants: dict[str, Seconds] = {}
    found: dict[str, Found] = {}
    for name, start in starters.items():
        try:
            contestants[name] = start()
            contestants[name](min(images, BATCH))  # warm up
        except NotHere as error:
            found[name] = Found(missing=str(error))
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, seconds in contestants.items():
            rates[name].append(images / seconds(images))
    return {name: found.get(name) or Found(tuple(rates[name])) for name in starters}


def _ours(shard: Path, side_px: int, decode: Literal["cpu", "dali"]) -> Seconds:
    """The training loader with one decoding thread.

    Raises:
        NotHere: DALI is not installed.
    """
    if decode == "dali" and not dali_installed():
        raise NotHere(f"needs DALI: {INSTALL_DALI}")
    config = DataConfig(
        images=(str(shard),), image_px=side_px, decode=decode, decode_threads=1, prefetch_batches=1
    )
    loader = Loader(config, 0, on_bad=_refuse)
    position = 0

    def seconds(images: int) -> float:
        nonlocal position
        end = position + images
        batches = [range(first, min(first + BATCH, end)) for first in range(position, end, BATCH)]
        position = end
        start = time.process_time()
        count = sum(len(batch.image_BCHW) for batch in loader.stream(batches))
        assert count == images
        return time.process_time() - start

    return seconds


def _refuse(report: BadSampleReport) -> None:
    raise AssertionError(f"an image of the benchmark's own cannot be read: {report}")


def _webdataset(shard: Path, side_px: int) -> Seconds:
    """webdataset, decoding with Pillow, with the crop before the resize.

    Raises:
        NotHere: webdataset is not installed.
    """
    if importlib.util.find_spec("webdataset") is None:
        raise NotHere("needs webdataset: pip install 'iomm[bench]'")
    webdataset = importlib.import_module("webdataset")

    def pixels(sample: tuple[Image.Image]) -> Tensor:
        [image] = sample
        box = View(side_px, side_px).box(*image.size)
        edges = (box.left_px, box.top_px, box.left_px + box.width_px, box.top_px + box.height_px)
        resized = image.resize((side_px, side_px), Image.Resampling.BICUBIC, box=edges)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def endless() -> Iterator[Tensor]:
        while True:
            dataset = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pilrgb").to_tuple("jpg")
            yield from dataset.map(pixels)

    samples = endless()

    def seconds(images: int) -> float:
        start = time.process_time()
        for first in range(0, images, BATCH):
            torch.stack([next(samples) for _ in range(min(BATCH, images - first))])
        return time.process_time() - start

    return seconds


def _floor(shard: Path, side_px: int) -> Seconds:
    """`jpeg_floor.c`, compiled here.

    Raises:
        NotHere: there is no C compiler, or no header of libjpeg-turbo.
    """
    compiler = shutil.which("cc")
    program, source = shard.with_name("jpeg_floor"), Path(__file__).with_name("jpeg_floor.c")
    command = [compiler or "cc", "-O3", "-march=native", str(source), "-o", str(program), "-ljpeg"]
    if compiler is None or subprocess.run(command, capture_output=True).returncode:
        raise NotHere(
            "needs a C compiler and libjpeg-turbo's header: apt-get install gcc libjpeg62-turbo-dev"
        )
    shards = ShardSet.open([str(shard)])
    position = 0

    def seconds(images: int) -> float:
        nonlocal position
        refs = [shards[i % len(shards)] for i in range(position, position + images)]
        position += images
        places = [f"{ref.image_offset}:{ref.image_size}" for ref in refs]
        done = subprocess.run(
            [str(program), str(shard), str(side_px), *places], capture_output=True, text=True, check=True
        )
        return float(done.stdout.split()[1])

    return seconds


def _report(found: dict[str, dict[str, Found]], side_px: int) -> str:
    """The table, the ratios and the line of JSON."""
    lines = [f"{'images per processor second':28}" + "".join(f"{name:>14}" for name in found)]
    for name in next(iter(found.values())):
        cells = [by_name[name] for by_name in found.values()]
        if cells[0].missing:
            lines.append(f"{name:28}  not measured: {cells[0].missing}")
        else:
            lines.append(f"{name:28}" + "".join(f"{cell.median:14.1f}" for cell in cells))
    ratios = {size: _ratios(by_name) for size, by_name in found.items()}
    for other in next(iter(ratios.values())):
        cells = "".join(f"{by_other[other]:13.2f}x" for by_other in ratios.values())
        lines.append(f"{'ours / ' + other:28}{cells}")
    record = {
        "bench": "data",
        "side_px": side_px,
        "load_average": os.getloadavg()[0],
        "images_per_cpu_second": {
            size: {name: cell.rates for name, cell in by_name.items() if cell.rates}
            for size, by_name in found.items()
        },
        "ours_over": ratios,
    }
    return "\n".join((*lines, json.dumps(record), ""))


def _ratios(by_name: dict[str, Found]) -> dict[str, float]:
    """Our rate over each other's: the median over rounds, whose two sides met the same moment."""
    ours = by_name["ours"].rates
    return {
        name: statistics.median(a / b for a, b in zip(ours, cell.rates, strict=True))
        for name, cell in by_name.items()
        if name != "ours" and cell.rates
    }
