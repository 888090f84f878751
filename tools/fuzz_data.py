"""Damaged inputs through `iomm shard make`, `iomm shard index` and the loader: `make fuzz-data`.

    python -m tools.fuzz_data [--inputs 10000] [--first 0] [--seed 0] [--only 17 --only 18]

Prints a table by kind of input and outcome. What is not accounted for (a crash, a hang, too much memory, an
image lost in silence, an error that is no message) is written to --out with its files, and the exit status is
then 1. `--only` runs single inputs again.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

from iomm.data.decoder import dali_installed
from tests.data.fuzz.table import Table
from tests.data.fuzz.watch import watch

DECODERS = ("cpu", "dali")
SHOWN = 20  # of the inputs that are not accounted for; all are kept


def main() -> int:
    """Run the inputs; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="the number of an input; may be repeated")
    parser.add_argument("--decode", choices=DECODERS, action="append", help="(default: both)")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz-data"), help="of inputs unaccounted for")
    arguments = parser.parse_args()

    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    table, begun = Table(arguments.seed), time.monotonic()
    numbers = arguments.only or range(arguments.first, arguments.first + arguments.inputs)
    decoders = arguments.decode or (DECODERS if dali_installed() else DECODERS[:1])
    console = Console(stderr=True)
    stopped = False
    try:
        for decode in decoders:
            runs = watch(arguments.seed, numbers, decode)
            for ran in track(runs, decode, len(numbers), console=console, disable=not console.is_terminal):
                table.add(ran, decode)
    except KeyboardInterrupt:
        stopped = True
    sys.stdout.write(table.text())
    if not dali_installed():
        sys.stdout.write("DALI is not installed: its path was not run\n")
    sys.stdout.write(f"{time.monotonic() - begun:.0f} s\n")
    if stopped:
        sys.stdout.write(f"stopped before all {len(numbers)} inputs were run\n")
    if not table.bad:
        return 130 if stopped else 0
    table.keep_bad(arguments.out)
    for decode, ran in table.bad[:SHOWN]:
        sys.stdout.write(f"{ran.number} ({decode}) {ran.what}: {ran.problems[0][-500:]}\n")
    sys.stdout.write(f"the inputs are in {arguments.out}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
