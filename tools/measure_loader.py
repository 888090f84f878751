"""Memory of the training loader, epoch by epoch, on synthetic JPEGs: it should not grow.

PYTHONPATH=.:kernels python tools/measure_loader.py [--images 200] [--epochs 10] [--threads 2]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from iomm.bench.data import write_shard
from iomm.config import DataConfig
from iomm.data.indexer import index_shard
from iomm.data.loader import Loader

BATCH = 20
SIZES_PX = ((1024, 768), (640, 960))  # width, height


def measure(folder: Path, images: int, epochs: int, threads: int) -> str:
    """Stream that many epochs with buckets, random crops and flips; a line an epoch."""
    for width, height in SIZES_PX:
        shard = write_shard(folder / f"{width}x{height}.tar", images // len(SIZES_PX), width, height)
        index_shard(str(shard))
    data = DataConfig(
        images=(str(folder / "*.tar"),),
        image_px=512,
        crop="random",
        flip=True,
        buckets=True,
        decode="cpu",
        decode_threads=threads,
    )
    bad: list[object] = []
    loader = Loader(data, 0, on_bad=bad.append, global_batch_images=BATCH, token_px=16)
    steps = range(0, images * epochs, BATCH)
    batches = loader.stream(range(first, first + BATCH) for first in steps)
    lines, start = [f"{images} images, resident memory by epoch"], time.perf_counter()
    for done, _ in zip(steps, batches, strict=True):
        if (done + BATCH) % images < BATCH:
            rate = (done + BATCH) / (time.perf_counter() - start)
            lines.append(
                f"epoch {(done + BATCH) // images:3d}  {_resident_mib():.0f} MiB  {rate:.0f} images/s so far"
            )
    return "\n".join([*lines, f"bad samples: {len(bad)}"]) + "\n"


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: Sequence[str]) -> int:
    """Make the images in a temporary folder and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(measure(Path(folder), arguments.images, arguments.epochs, arguments.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
