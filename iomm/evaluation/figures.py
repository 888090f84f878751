"""Figures of a report as SVG text, one for light and one for dark pages, on a transparent background."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iomm.evaluation.bootstrap import Interval
from iomm.evaluation.runlog import Record
from iomm.evaluation.scores import BenchScore, Reconstruction

# (light, dark[, line style]): Okabe-Ito colours serve without colour vision, the styles without any colour.
CONDITIONS = {
    "image": ("#0072B2", "#56B4E9", "-"),
    "text": ("#D55E00", "#E69F00", "--"),
    "null": ("#777777", "#A0A0A0", ":"),
}
PARTS = {
    "generator": ("#0072B2", "#56B4E9"),
    "mllm": ("#D55E00", "#E69F00"),
    "vit": ("#009E73", "#2BC59A"),
    "vae": ("#CC79A7", "#E3A5C7"),
}
# Likeness of generated pictures to input pictures, by the key that the log has it under.
LIKENESS = {
    "psnr_image_db": ("masked image, to its own image", *CONDITIONS["image"]),
    "psnr_null_db": ("null, to its own image", *CONDITIONS["null"]),
    "psnr_null_other_db": ("null, to other images", "#CC79A7", "#E3A5C7", "-."),
}
INK, LINES = ("#1b1f24", "#e6e8eb"), ("#d0d5db", "#3a4048")  # light, dark
MAX_POINTS = 2000  # of one curve; a longer one is thinned out
SIZE_IN = (4.4, 2.6)  # small, so that the text is still readable at the width of a phone


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure in both renditions, with the sentence that stands in for it where it cannot be seen."""

    light_svg: str
    dark_svg: str
    alt: str


Draw = Callable[[Axes, int], None]  # draws on axes; the number is 0 for light, 1 for dark


def picture(draw: Draw, *, alt: str) -> Picture:
    """Run `draw` twice, on light and on dark axes."""
    return Picture(light_svg=_svg(draw, 0), dark_svg=_svg(draw, 1), alt=alt)


def series(records: Sequence[Record], *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (fp64, both (N,)) of the number under nested `keys`; records without it are left out.

    null and NaN stay as NaN: a curve shows a gap there.
    """
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key, ...) if isinstance(value, dict) else ...
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            steps.append(record["step"])
            values.append(math.nan if value is None else float(value))
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite ones among `window` neighbours (fewer at the ends), (N,); NaN if there is none."""
    finite = np.isfinite(values)
    total, count = np.cumsum(np.r_[0.0, np.where(finite, values, 0.0)]), np.cumsum(np.r_[0, finite])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    n = count[high] - count[low]
    return np.divide(total[high] - total[low], n, out=np.full(len(values), math.nan), where=n > 0)


def loss_curve(records: Sequence[Record]) -> Picture:
    """Training loss of every logged step, and its running mean."""
    steps, loss = series(records, "loss")
    window = max(1, len(loss) // 25) | 1  # odd, so that the mean is centred
    mean, stride = smooth(loss, window), 1 + len(loss) // MAX_POINTS
    raw_label = "logged" if stride == 1 else f"logged, one in {stride} shown"

    def draw(ax: Axes, dark: int) -> None:
        color = CONDITIONS["image"][dark]
        ax.plot(steps[::stride], loss[::stride], color=color, alpha=0.35, linewidth=0.8, label=raw_label)
        ax.plot(steps[::stride], mean[::stride], color=color, linewidth=2, label=f"mean of {window} points")
        ax.set(xlabel="step", ylabel="velocity loss", ylim=_robust_limits(loss))
        ax.legend()

    return picture(draw, alt=f"Training loss over steps, {_span(loss)}.")


def gradient_curve(records: Sequence[Record], skipped_steps: Sequence[int]) -> Picture:
    """Gradient norm before clipping, on a logarithmic axis; skipped steps as marks on the axis."""
    steps, norm = series(records, "grad_norm")
    stride = 1 + len(norm) // MAX_POINTS
    positive = np.where(norm > 0, norm, math.nan)

    def draw(ax: Axes, dark: int) -> None:
        ax.plot(steps[::stride], positive[::stride], color=PARTS["vit"][dark], linewidth=1)
        ax.set(xlabel="step", ylabel="gradient norm", yscale="log")
        if skipped_steps:
            at_the_bottom = {"transform": ax.get_xaxis_transform(), "color": CONDITIONS["text"][dark]}
            ax.plot(skipped_steps, [0.03] * len(skipped_steps), "x", label="skipped step", **at_the_bottom)
            ax.legend()

    return picture(draw, alt=f"Gradient norm over steps, {_span(norm)}; {len(skipped_steps)} steps skipped.")


def heldout_curve(evals: Sequence[Record]) -> Picture:
    """Held-out velocity loss over steps for each kind of condition."""
    lines = {name: series(evals, "velocity_loss", name) for name in CONDITIONS}

    def draw(ax: Axes, dark: int) -> None:
        for name, (steps, loss) in lines.items():
            if len(steps):
                _condition_line(ax, dark, name, steps, loss)
        ax.set(xlabel="step", ylabel="held-out velocity loss")
        _legend_above(ax, len(lines))

    ends = [f"{name} ends at {loss[-1]:.4g}" for name, (_, loss) in lines.items() if len(loss)]
    return picture(draw, alt=f"Held-out velocity loss over steps: {', '.join(ends)}.")


def timestep_curve(record: Record) -> Picture:
    """Held-out velocity loss against the timestep, of one evaluation."""
    times = record["timesteps"]
    lines = {name: record["by_timestep"][name] for name in CONDITIONS if name in record["by_timestep"]}

    def draw(ax: Axes, dark: int) -> None:
        for name, loss in lines.items():
            _condition_line(ax, dark, name, times, loss)
        ax.set(xlabel="timestep t (0 = data, 1 = noise)", ylabel="held-out velocity loss")
        _legend_above(ax, len(lines))

    return picture(draw, alt=f"Held-out velocity loss at {len(times)} timesteps, step {record['step']}.")


def copying_curve(evals: Sequence[Record]) -> Picture:
    """PSNR over steps of generated pictures, as the copying check takes it."""
    lines = {key: series(evals, "copying", key) for key in LIKENESS}
    lines = {key: (steps, db) for key, (steps, db) in lines.items() if len(steps)}

    def draw(ax: Axes, dark: int) -> None:
        for key, (steps, db) in lines.items():
            label, *colors, style = LIKENESS[key]
            ax.plot(steps, db, style, marker="o", markersize=3, color=colors[dark], label=label)
        ax.set(xlabel="step", ylabel="PSNR, dB")
        _legend_above(ax, 1)

    ends = [f"{LIKENESS[key][0]} ends at {db[-1]:.4g} dB" for key, (_, db) in lines.items()]
    return picture(draw, alt=f"Likeness of generated pictures to input pictures: {'; '.join(ends)}.")


def reconstruction_curve(found: Reconstruction) -> Picture:
    """PSNR against the mask ratio with its interval; the null condition and the trained ratio as lines."""
    null = dict(zip(found.ratios, found.psnr_db, strict=True)).get(1.0)

    def draw(ax: Axes, dark: int) -> None:
        *colors, style = CONDITIONS["image"]
        _line_with_interval(ax, found.ratios, found.psnr_db, colors[dark], style, "masked image condition")
        if null is not None:
            *null_colors, null_style = CONDITIONS["null"]
            ax.axhline(null.mean, linestyle=null_style, color=null_colors[dark], label="null condition")
        trained = {"linestyle": "--", "linewidth": 1, "color": CONDITIONS["text"][dark]}
        ax.axvline(found.trained_mask_ratio, label=f"trained with {found.trained_mask_ratio:g}", **trained)
        ax.set(xlabel="mask ratio", ylabel="PSNR, dB")
        _legend_above(ax, 2)

    points = [f"{db.mean:.4g} dB at {ratio:g}" for ratio, db in zip(found.ratios, found.psnr_db, strict=True)]
    return picture(draw, alt=f"PSNR against the mask ratio: {', '.join(points)}.")


def score_curve(scores: Sequence[BenchScore]) -> Picture:
    """Overall score of one benchmark over steps, with its interval."""
    overall = [score.overall for score in scores]

    def draw(ax: Axes, dark: int) -> None:
        *colors, style = CONDITIONS["image"]
        _line_with_interval(ax, [score.step for score in scores], overall, colors[dark], style, "overall")
        ax.set(xlabel="step", ylabel=f"score (best: {scores[0].best:g})")

    ends = f"from {overall[0].mean:.4g} to {overall[-1].mean:.4g}"
    return picture(draw, alt=f"Overall score of {scores[0].bench} over steps, {ends}.")


def throughput_curve(records: Sequence[Record]) -> Picture:
    """TFLOP/s over steps, stacked by part."""
    shown = records[:: 1 + len(records) // MAX_POINTS]
    lines = {name: series(shown, "tflops", name) for name in PARTS}
    steps = max((at for at, _ in lines.values()), key=len)
    lines = {name: (at, value) for name, (at, value) in lines.items() if np.nansum(value) > 0}
    stack = {name: np.interp(steps, at, np.nan_to_num(value)) for name, (at, value) in lines.items()}

    def draw(ax: Axes, dark: int) -> None:
        colors = [PARTS[name][dark] for name in stack]
        ax.stackplot(steps, list(stack.values()), labels=list(stack), colors=colors, alpha=0.85)
        ax.set(xlabel="step", ylabel="TFLOP/s", ylim=(0, None))
        _legend_above(ax, len(stack))

    means = [f"{name} {np.median(value):.3g}" for name, value in stack.items()]
    return picture(draw, alt=f"TFLOP/s over steps by part; medians: {', '.join(means)}.")


def _condition_line(ax: Axes, dark: int, name: str, x: Sequence[float] | np.ndarray, y: np.ndarray) -> None:
    *colors, style = CONDITIONS[name]
    ax.plot(x, y, style, marker="o", markersize=3, color=colors[dark], label=f"{name} condition")


def _line_with_interval(
    ax: Axes, x: Sequence[float], y: Sequence[Interval], color: str, style: str, label: str
) -> None:
    ax.fill_between(x, [i.low for i in y], [i.high for i in y], color=color, alpha=0.2, linewidth=0)
    ax.plot(x, [i.mean for i in y], style, marker="o", markersize=3.5, color=color, label=label)


def _legend_above(ax: Axes, columns: int) -> None:
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, columnspacing=1.2, handlelength=1.6
    )


def _span(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return f"from {finite[0]:.4g} to {finite[-1]:.4g}" if len(finite) else "no finite value"


def _robust_limits(values: np.ndarray) -> tuple[float, float] | None:
    """The lower 99 % with a margin, so that a few spikes do not flatten the rest; None: no span."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return None
    low, high = float(finite.min()), float(np.quantile(finite, 0.99))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _svg(draw: Draw, dark: int) -> str:
    with _style(dark):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, axis="y")
        draw(axes, dark)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


@contextmanager
def _style(dark: int) -> Iterator[None]:
    ink, lines = INK[dark], LINES[dark]
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "iomm",  # the same run gives the same bytes
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": lines,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": lines,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }
    with mpl.rc_context(settings):  # pyright: ignore[reportArgumentType]
        yield
