"""The benchmark's command line: `iomm bench kernels` and tools/bench_kernels.py. Torch waits till it runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import iomm_kernels

DESCRIPTION = "every operator, eager PyTorch against its kernels and other libraries, in one run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, where, and what to do with it."""

    def add_list(name: str, default: str, text: str) -> None:
        parser.add_argument(name, default=default, metavar="A,B", help=f"{text} (default {default})")

    add_list("--ops", ",".join(iomm_kernels.MODULES), "operators")
    add_list("--presets", "b", "shapes of which presets: b, l, xl, cpu")
    add_list("--px", "512", "image sides in pixels: 512, 1024")
    add_list("--dtypes", "auto", "fp32, bf16, fp16; auto: bf16 on a GPU, fp32 on a CPU")
    add_list(
        "--providers", "auto", "eager, compile, triton, csrc, sdpa, flash, te, liger; auto: all of the device"
    )
    add_list("--passes", "forward,both", "forward, backward, both")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench_kernels"), help="folder of JSON, CSV and PNG"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="an older bench.json to compare with"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, write, compare.

    Raises:
        ValueError: something asked for does not exist, or the older result is none.
    """
    import torch
    from rich.console import Console

    from iomm_kernels import bench, bench_report

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    old = None if arguments.compare is None else bench_report.read(arguments.compare)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    dtypes = ("bf16" if on_gpu else "fp32") if arguments.dtypes == "auto" else arguments.dtypes
    providers = ",".join(bench.PROVIDERS) if on_gpu else "eager,compile,csrc"
    if arguments.providers != "auto":
        providers = arguments.providers
    request = bench.Request(
        ops=_split(arguments.ops),
        presets=_split(arguments.presets),
        sides_px=tuple(map(int, _split(arguments.px))),
        dtypes=_split(dtypes),
        providers=_split(providers),
        passes=_split(arguments.passes),
        device=device,
        repeats=arguments.repeats,
    )
    result = bench.measure(request, say=_say)
    bench_report.show(result, Console(width=None if sys.stdout.isatty() else 200))
    for path in bench_report.write(result, arguments.out):
        sys.stdout.write(f"{path}\n")
    if old is not None:
        sys.stdout.write("\n".join([*bench_report.compare(old, result), ""]))
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def main(argv: Sequence[str] | None = None) -> int:
    """The command as a program of its own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except ValueError as error:
        parser.error(str(error))
