"""A benchmark's result: table, CSV, JSON, plot, and against an older one. Needs rich and matplotlib."""

import csv
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iomm_kernels.bench import Result, Row, Skipped

PALETTE = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def write(result: Result, folder: Path) -> tuple[Path, ...]:
    """bench.json, bench.csv and bench.png in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"bench.{suffix}" for suffix in ("json", "csv", "png"))
    paths[0].write_text(json.dumps(asdict(result), indent=1))
    _write_csv(result, paths[1])
    _plot(result, paths[2])
    return paths


def read(path: Path) -> Result:
    """A bench.json.

    Raises:
        ValueError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        rows = [Row(**row) for row in found.pop("rows")]
        skipped = [Skipped(**gap) for gap in found.pop("skipped")]
        return Result(**found, rows=rows, skipped=skipped)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of this benchmark ({error}). Give a bench.json.") from error


def show(result: Result, console: Console) -> None:
    """The table, what was not measured and why, and the ceilings."""
    table = Table(title=f"{result.device}, torch {result.torch}, {result.threads} threads")
    for name in ("operator", "shape", "dtype", "pass", "provider"):
        table.add_column(name)
    for name in ("median ms", "p20 .. p80", "GB/s", "TFLOP/s", "% of ceiling", "as fast as the others"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(
            row.op,
            f"{row.preset} {row.side_px} px",
            row.dtype,
            row.pass_name,
            row.provider,
            f"{row.median_ms:.3f}",
            f"{row.p20_ms:.3f} .. {row.p80_ms:.3f}",
            f"{row.gb_per_s:.1f}",
            "" if row.tflop_per_s is None else f"{row.tflop_per_s:.2f}",
            f"{row.percent_of_ceiling:.0f}",
            ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row.faster_than.items()),
        )
    console.print(table)
    for gap in result.skipped:
        console.print(f"not measured: {gap.what}: {gap.why}", markup=False)
    products = ", ".join(f"{value:.2f} TFLOP/s {dtype}" for dtype, value in result.matmul_tflop_per_s.items())
    console.print(f"ceilings of this run: copy {result.copy_gb_per_s:.1f} GB/s, matrix product {products}")


def compare(old: Result, new: Result) -> list[str]:
    """A line for each measurement that both runs hold, and their middle.

    Raises:
        ValueError: they hold none in common.
    """
    before = {row.key: row for row in old.rows}
    lines: list[str] = []
    ratios: list[float] = []
    for row in new.rows:
        if row.key in before:
            ratios.append(before[row.key].median_ms / row.median_ms)
            name = " ".join(map(str, row.key))
            times = f"{before[row.key].median_ms:.3f} -> {row.median_ms:.3f} ms"
            lines.append(f"{name}: {times}, {ratios[-1]:.2f}x")
    if not ratios:
        raise ValueError("the older result holds none of these measurements. Choose the same ops and shapes.")
    if (old.device, old.threads) != (new.device, new.threads):
        lines.append(
            f"the older result is of another machine or thread count: {old.device}, {old.threads} threads"
        )
    return [*lines, f"median of {len(ratios)}: {statistics.median(ratios):.2f}x as fast as before"]


def _write_csv(result: Result, path: Path) -> None:
    peers = list(dict.fromkeys(peer for row in result.rows for peer in row.faster_than))
    with path.open("w", newline="") as file:
        names = [name for name in Row.__dataclass_fields__ if name != "faster_than"]
        writer = csv.writer(file)
        writer.writerow([*names, *(f"faster_than_{peer}" for peer in peers)])
        for row in result.rows:
            ratios = [row.faster_than.get(peer, "") for peer in peers]
            writer.writerow([*("" if (v := getattr(row, name)) is None else v for name in names), *ratios])


def _plot(result: Result, path: Path) -> None:
    """Bars of GB/s, one group a measurement, and the copy ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(row.key[:-1] for row in result.rows))
    providers = list(dict.fromkeys(row.provider for row in result.rows))
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.28 * max(1, len(result.rows))), layout="constrained")
    height = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        rows = [row for row in result.rows if row.provider == provider]
        places = [groups.index(row.key[:-1]) + (i - (len(providers) - 1) / 2) * height for row in rows]
        rates = [row.gb_per_s for row in rows]
        axes.barh(places, rates, height, label=provider, color=PALETTE[i % len(PALETTE)])
    axes.axvline(result.copy_gb_per_s, color="black", linestyle="--", linewidth=1, label="copy")
    axes.set_yticks(range(len(groups)), [" ".join(map(str, group)) for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the bytes that have to move (longer is better)")
    axes.set_title(f"{result.device}, torch {result.torch}, {result.threads} threads")
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
