"""Opening a generated feature cache of many images, and reading batches from it: time and memory, in a fresh
process.

    python tools/measure_cache.py [--images 11000000] [--batch 16]

Rows are latents of the B preset (1024 tokens of 64 numbers, fp32) whose values are holes in the files, so
only keys take disk space (about 35 bytes an image), and reading measures memory, checksums and calls: the
disk's share comes on top.
"""

import argparse
import hashlib
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from iomm.data.cache import PART_BYTES, FeatureCache
from iomm.data.feature_shards import SUFFIX, Layout, _header, _record, row_bytes

TOKENS, NUMBERS = 1024, 64
_LAYOUT: Layout = {"mean": (torch.float32, NUMBERS)}
_BATCHES = 100


def key(image: int) -> str:
    """The key of the n-th generated image."""
    return hashlib.md5(image.to_bytes(8, "little"), usedforsecurity=False).hexdigest()


def generate(folder: Path, images: int) -> None:
    """Parts of the usual size for `images` images."""
    rows = PART_BYTES // (TOKENS * NUMBERS * 4)
    (folder / "id").mkdir()
    for first in range(0, images, rows):
        count = min(rows, images - first)
        records_N = np.zeros(count, _record(1))
        keys = b"".join(bytes.fromhex(key(first + n)) for n in range(count))
        records_N["key"] = np.frombuffer(keys, "V16")
        records_N["first"] = np.arange(count) * TOKENS
        records_N["tokens"] = TOKENS
        records_N["crc32"][:, 0] = zlib.crc32(bytes(TOKENS * NUMBERS * 4))
        records = records_N.tobytes()
        header = _header(_LAYOUT, records, count, count * TOKENS)
        with open(folder / "id" / f"part-{first:08}{SUFFIX}", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + records)
            file.truncate(8 + len(header) + count * row_bytes(_LAYOUT, TOKENS))


def measure(folder: Path, images: int, batch: int) -> str:
    """Open the cache; look keys up and read batches all over it."""
    before = _peak_mib()
    start = time.perf_counter()
    cache = FeatureCache(folder, "id", ["mean"])
    opened = time.perf_counter() - start
    after = _peak_mib()
    scattered = [key(n * 7919 * 104_729 % images) for n in range(_BATCHES * batch)]
    start = time.perf_counter()
    assert not cache.missing(scattered)
    looked_up = time.perf_counter() - start
    start = time.perf_counter()
    for n in range(_BATCHES):
        assert len(cache.find(scattered[n * batch : (n + 1) * batch])) == batch
    read = time.perf_counter() - start
    gigabytes = len(scattered) * TOKENS * NUMBERS * 4 / 1e9
    return (
        f"{len(cache):,} rows in {len(list((folder / 'id').iterdir())):,} parts: opened in {opened:.1f} s\n"
        f"peak memory of the process: {before:.0f} MiB before, {after:.0f} MiB after opening, "
        f"{_peak_mib():.0f} MiB at the end\n"
        f"a look-up, scattered: {looked_up / len(scattered) * 1e6:.0f} us; a batch of {batch}, scattered: "
        f"{read / _BATCHES * 1e3:.1f} ms, {gigabytes / read:.1f} GB/s\n"
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: Sequence[str]) -> int:
    """Generate, then measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=11_000_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="for the cache (default: the temporary folder)")
    parser.add_argument("--open", type=Path, help="measure this generated cache only")
    arguments = parser.parse_args(argv)
    if arguments.open:
        sys.stdout.write(measure(arguments.open, arguments.images, arguments.batch))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        generate(Path(folder), arguments.images)
        return subprocess.run([sys.executable, __file__, "--open", folder, *argv], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
