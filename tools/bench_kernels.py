"""Benchmark of the kernels without an installed iomm: `python tools/bench_kernels.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from iomm_kernels.bench_cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
