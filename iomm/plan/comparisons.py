"""Tables that compare: layouts with each other, levers, and the model with published runs."""

from collections.abc import Sequence

from iomm.plan import calibration
from iomm.plan.calibration import Efficiency
from iomm.plan.hardware import GIB
from iomm.plan.layouts import Ranked, describe, why_too_large
from iomm.plan.levers import PAPER_IMAGES_PER_S, TARGET_IMAGES_PER_S, Level, needed_factor
from iomm.plan.step import Estimate
from iomm.plan.tables import Table

SHOWN = 10  # layouts in a table


def ranking(ranked: Ranked) -> list[Table]:
    """The fastest layouts, and what is wrong with the others."""
    columns = ("layout", "images/s/GPU", "step ms", "MFU", "peak GiB")

    def row(made: Estimate) -> tuple[str, ...]:
        layout = describe(made.work.config.parallel, made.work.config.train.micro_batch_images)
        return (
            layout,
            f"{made.images_per_s:.1f}",
            f"{1000 * made.seconds:.0f}",
            f"{made.mfu:.1%}",
            f"{made.peak_bytes / GIB:.1f}",
        )

    tables = []
    if ranked.feasible:
        title = (
            f"Layouts: the fastest {min(SHOWN, len(ranked.feasible))} of {len(ranked.feasible)} feasible ones"
        )
        tables.append(Table(title, columns, [row(made) for made in ranked.feasible[:SHOWN]]))
    rows: list[Sequence[str]] = [
        (describe(m.work.config.parallel, m.work.config.train.micro_batch_images), why_too_large(m))
        for m in ranked.too_large[: SHOWN // 2]
    ]
    if len(ranked.too_large) > len(rows):
        rows.append((f"{len(ranked.too_large) - len(rows)} more", "memory"))
    rows += [
        (f"{len(found)} layouts", "for instance: " + found[0].split(". ")[0].rstrip("."))
        for found in ranked.refused.values()
    ]
    if rows:
        tables.append(Table("Infeasible layouts", ("layout", "why"), rows))
    return tables


def lever_tables(levels: Sequence[Level], fitted: Efficiency) -> list[Table]:
    """The way from the paper's rate to the target, and whether it gets there."""
    first, cached = levels[0], next(level for level in levels if level.name == "cached VAE moments")
    other = first.made.images_per_s * cached.alone
    rows = [
        (
            level.name if i == 0 else f"+ {level.name}",
            f"{level.made.flops / 1e12:.2f}",
            f"{level.low:.1f}",
            f"{level.made.images_per_s:.1f}",
            f"{level.high:.1f}",
            f"{PAPER_IMAGES_PER_S * level.made.images_per_s / first.made.images_per_s:.1f}",
            f"{PAPER_IMAGES_PER_S * level.made.images_per_s / other:.1f}",
            f"x {level.alone:.2f}",
        )
        for i, level in enumerate(levels)
    ]
    columns = (
        "levers, one on top of the other",
        "TFLOP an image",
        "low",
        "fitted",
        "high",
        "scaled (a)",
        "scaled (b)",
        "alone",
    )
    notes = [
        "low, fitted, high: predicted images/s of one GPU at the slowest calibration run's factor, the "
        "fitted one, and the fastest run's. scaled: the fitted ones, if the paper's 30.6 is (a) the method "
        "as printed, or (b) that with latents encoded beforehand; the paper does not say.",
        f"{TARGET_IMAGES_PER_S:.0f} images/s with every lever needs a system factor of "
        f"{needed_factor(levels[-1].made, fitted, TARGET_IMAGES_PER_S):.2f}; the paper's "
        f"{PAPER_IMAGES_PER_S} with none needs {needed_factor(first.made, fitted, PAPER_IMAGES_PER_S):.2f}. "
        f"The runs span {calibration.spread()[0].system:.2f} to {calibration.spread()[1].system:.2f}.",
    ]
    notes.append(
        f"The paper's own run is no part of the fit: the model gives {first.made.images_per_s:.1f} for (a), "
        f"{first.made.images_per_s / PAPER_IMAGES_PER_S - 1:+.0%}, and {other:.1f} for (b), "
        f"{other / PAPER_IMAGES_PER_S - 1:+.0%}."
    )
    return [Table("From the method as printed to the target", columns, rows, notes), _where(levels)]


def _where(levels: Sequence[Level]) -> Table:
    parts = [name for name in levels[0].made.parts if levels[0].made.parts[name] > 0]
    rows = [
        (level.name if i == 0 else f"+ {level.name}", *(f"{1000 * level.made.parts[p]:.0f}" for p in parts))
        for i, level in enumerate(levels)
    ]
    return Table("Where a step's milliseconds go (fitted factor)", ("levers", *parts), rows)


def calibration_tables() -> list[Table]:
    """Sources of the efficiencies and the model's error on published runs."""
    kernels = [(s.what, s.value, s.address) for s in calibration.KERNELS]
    rows = [
        (
            check.run.name,
            f"{check.run.tokens_per_s:,.0f}",
            f"{check.predicted:,.0f}",
            f"{check.error:+.0%}",
            f"{check.left_out_error:+.0%}",
            check.run.address + (f" ({check.run.note})" if check.run.note else ""),
        )
        for check in calibration.checks()
    ]
    columns = ("run", "tokens/s/GPU", "model", "error", "left out", "source")
    note = (
        f"System factor fitted to these runs: {calibration.fit().system:.3f}. `left out` is the error of a "
        "factor fitted to the other runs: what to expect of a run the planner has not seen."
    )
    return [
        Table("Efficiencies of kernels", ("kernels", "fraction of peak", "source"), kernels),
        Table("Published runs", columns, rows, [note]),
    ]
