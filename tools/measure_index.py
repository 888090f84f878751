"""Opening a generated index of many images: time and memory, in a fresh process.

    python tools/measure_index.py [--images 11000000] [--shard-images 10000]

The shards themselves are empty files of the right size (holes, no disk space): opening looks at their size
and time only. The index needs about 85 bytes an image in --folder while this runs.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from iomm.data import stores
from iomm.data.index import ShardIndex, write_index
from iomm.data.shards import ShardSet
from iomm.data.tar_members import SampleRef

IMAGE_BYTES, CAPTION_BYTES = 80_000, 100
_DRAWS = 10_000


def generate(folder: Path, images: int, shard_images: int) -> str:
    """An index of `images` samples, every other with a caption; its path."""
    samples = [
        SampleRef("", f"key_{j:010}", 512 + j * 82_000, IMAGE_BYTES, *_caption(j), "ab" * 16, (1024, 768))
        for j in range(shard_images)
    ]
    template = ShardIndex.build("", stores.Stamp(0, 0), samples)

    def shards() -> Iterator[ShardIndex]:
        for k in range(images // shard_images):
            path = folder / f"shard-{k:06}.tar"
            with open(path, "wb") as file:
                file.truncate(shard_images * 82_000)
            yield replace(template, name=path.name, stamp=stores.stamp(str(path)))

    write_index(str(folder / "set.index"), shards())
    return str(folder / "set.index")


def _caption(j: int) -> tuple[int | None, int | None]:
    return (512 + j * 82_000 + 81_000, CAPTION_BYTES) if j % 2 else (None, None)


def measure(index: str) -> str:
    """Open the index, all of it and its captioned half; look up samples across it."""
    before = _peak_mib()
    start = time.perf_counter()
    everything = ShardSet.open([index])
    opened = time.perf_counter() - start
    pairs = ShardSet.open([index], captioned_only=True)
    after = _peak_mib()
    start = time.perf_counter()
    for n in range(_DRAWS):
        _ = everything[n * 7919 * 104_729 % len(everything)]
    draw_us = (time.perf_counter() - start) / _DRAWS * 1e6
    drawn = _peak_mib()
    start = time.perf_counter()
    good = int(everything.good_N().sum())
    verdicts_s = time.perf_counter() - start
    size_mb = os.path.getsize(index) / 1e6
    return (
        f"{len(everything):,} images, {len(pairs):,} with a caption, {size_mb:.0f} MB of index: opened in "
        f"{opened:.2f} s\n"
        f"peak memory of the process: {before:.0f} MiB before, {after:.0f} MiB with both sets open, "
        f"{drawn:.0f} MiB after {_DRAWS:,} look-ups\n"
        f"a look-up, scattered over the shards: {draw_us:.0f} us; verdicts of all {good:,} images: "
        f"{verdicts_s:.2f} s\n" + _sort(index)
    )


def _sort(index: str) -> str:
    """Open a training loader with aspect-ratio buckets on the index, and ask what stands at some indices."""
    from iomm.config import DataConfig  # torch comes with it, which is no part of the index
    from iomm.data.loader import Loader

    data = DataConfig(images=(index,), pairs=(index,), mix_ratio=0.5, buckets=True, crop="random")
    before, start = _peak_mib(), time.perf_counter()
    loader = Loader(data, 0, on_bad=lambda bad: None, global_batch_images=1024, token_px=16)
    opened, after = time.perf_counter() - start, _peak_mib()
    start = time.perf_counter()
    for n in range(_DRAWS):
        loader.size_px(n * 7919)
    size_us = (time.perf_counter() - start) / _DRAWS * 1e6
    return (
        f"a loader with buckets, images and pairs: opened in {opened:.2f} s, peak {before:.0f} -> "
        f"{after:.0f} MiB; size of the image at an index: {size_us:.0f} us\n"
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: Sequence[str]) -> int:
    """Generate, then measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=11_000_000)
    parser.add_argument("--shard-images", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="for the index (default: the temporary folder)")
    parser.add_argument("--open", help="measure this index only")
    arguments = parser.parse_args(argv)
    if arguments.open:
        sys.stdout.write(measure(arguments.open))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        index = generate(Path(folder), arguments.images, arguments.shard_images)
        return subprocess.run([sys.executable, __file__, "--open", index], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
