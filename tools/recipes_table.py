"""Table and figure of the recipes: what `tools/recipes.py` has scored, beside the paper's GenEval numbers."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from iomm.evaluation.bootstrap import Interval, interval_of_means
from iomm.evaluation.runlog import read_run
from iomm.evaluation.shapes.prompts import CATEGORIES, SPLITS
from tools.recipes import Bench, Run

# GenEval of IOMM-B by recipe, and of the ablation (XL): the paper's.
PAPER = {
    "image+image": 0.61,
    "image+pair": 0.87,
    "image+mix": 0.89,
    "pair+image": 0.78,
    "pair+pair": 0.86,
    "pair+mix": 0.88,
    "image+mix raw": 0.44,
    "image+mix rqa": 0.82,
}
SPLIT_TITLES = {"seen": "overall", "heldout_kind": "held-out kinds", "heldout_relation": "held-out relations"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe: the mean over its seeds, with intervals over prompts."""

    name: str
    seeds: int
    steps: tuple[int, int]
    batch_images: int
    splits: dict[str, Interval]
    categories: dict[str, float]
    by_seed: list[float]  # overall score of each seed
    # Held-out velocity loss with the caption at the end of each seed's run: mean over the evaluation's
    # timesteps, and over all but the smallest, which is half of the mean and little of it the caption's.
    losses: list[tuple[float, float]]

    @property
    def paper(self) -> float | None:
        """The paper's GenEval of the recipe, whatever MLLM of ours conditioned it."""
        return PAPER.get(self.name.removesuffix(" mllm"))


def rows(bench: Bench, runs: Sequence[Run]) -> list[Row]:
    """A row for every recipe of which each seed has a score; the others are left out."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        name = f"{run.first}+{run.second}" + (f" {run.label}" if run.label else "")
        groups.setdefault(name, []).append(run)
    found = []
    for name, group in groups.items():
        if all(bench.score(run) is not None for run in group):
            found.append(_row(bench, name, group))
    return found


def _row(bench: Bench, name: str, group: Sequence[Run]) -> Row:
    correct = [_correct(bench.score_file(run).parent / "verdicts.jsonl") for run in group]
    # A prompt is one number: the mean over its pictures of all seeds.
    prompts = {key: float(np.mean([c for one in correct for c in one[key]])) for key in correct[0]}
    splits, categories = {}, {}
    for split, of in SPLITS.items():
        means = [np.array([v for (s, c, _), v in prompts.items() if (s, c) == (split, cat)]) for cat in of]
        splits[split] = interval_of_means(means)
        if split == "seen":
            categories = {cat: float(mean.mean()) for cat, mean in zip(of, means, strict=True)}
    by_seed = [
        float(np.mean([np.mean([np.mean(v) for (s, c, _), v in one.items() if (s, c) == ("seen", cat)])
                       for cat in CATEGORIES]))
        for one in correct
    ]  # fmt: skip
    second = group[0]
    origin = second.origin
    assert origin is not None
    train = bench.config(second).train
    return Row(
        name=name,
        seeds=len(group),
        steps=(bench.config(origin).train.steps, train.steps),
        batch_images=train.global_batch_images,
        splits=splits,
        categories=categories,
        by_seed=by_seed,
        losses=[_losses(bench.config(run).run_dir) for run in group],
    )


def _losses(run_dir: Path) -> tuple[float, float]:
    """Of a run's last evaluation, as `Row.losses`."""
    last = read_run(run_dir).evals[-1]
    smallest, *others = [
        loss for _, loss in sorted(zip(last["timesteps"], last["by_timestep"]["text"], strict=True))
    ]
    return float(np.mean([smallest, *others])), float(np.mean(others))


def _correct(file: Path) -> dict[tuple[str, str, int], list[bool]]:
    """(split, category, prompt number) -> whether each of its pictures is correct."""
    out: dict[tuple[str, str, int], list[bool]] = {}
    for line in file.read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        key = record["split"], record["tag"], record["number"]
        out.setdefault(key, []).append(record["correct"])
    return out


def write_results(bench: Bench, name: str, runs: Sequence[Run]) -> Path:
    """NAME.md, NAME.json and NAME.svg under examples/recipes.

    Raises:
        ValueError: nothing is scored yet, or a scored run's folder is gone.
    """
    found = rows(bench, runs)
    if not found:
        raise ValueError(f"no run of {name!r} is scored with all its seeds yet. Run tools/recipes.py first.")
    out = bench.root / "examples" / "recipes"
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "-C", str(bench.root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    command = f"{bench.command(name)} --seeds {found[0].seeds}"
    record = {"command": command, "commit": commit, "rows": [asdict(row) for row in found]}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    _figure(found).savefig(out / f"{name}.svg", metadata={"Date": None})
    table = out / f"{name}.md"
    missing = len({(r.first, r.second, r.label) for r in runs}) - len(found)
    heading = f"`{command}`, code {commit}"
    table.write_text(f"# {name}\n\n{_table(found, heading, missing)}\n![scores]({name}.svg)\n")
    return table


def _table(found: Sequence[Row], heading: str, missing: int) -> str:
    first = found[0]
    titles = [
        "recipe",
        *(SPLIT_TITLES[s] for s in SPLITS),
        *(c.replace("_", " ") for c in CATEGORIES),
        "loss",
        "without the smallest t",
        "paper",
    ]
    lines = [
        f"{heading}: {first.steps[0]} + {first.steps[1]} steps of {first.batch_images} images. Share of "
        "correct pictures on the shapes world, in GenEval's categories; intervals (95 %) are over prompts. "
        "Loss: held-out velocity loss with the caption, EMA weights, mean over timesteps. "
        "paper: its GenEval, of a model 300 times as large: the order may be compared, the numbers may not.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    for row in found:
        cells = [row.name]
        for split in SPLITS:
            i = row.splits[split]
            cells.append(f"{i.mean:.2f} ({i.low:.2f} - {i.high:.2f})")
        cells += [f"{row.categories[c]:.2f}" for c in CATEGORIES]
        cells += [f"{loss:.3f}" for loss in np.mean(row.losses, axis=0)]
        cells.append("" if row.paper is None else f"{row.paper:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    if missing:
        lines += ["", f"{missing} more are not trained yet."]
    return "\n".join([*lines, ""])


def _figure(found: Sequence[Row]) -> Figure:
    """Scores with their intervals, a dot for every seed, the paper's numbers beside them."""
    figure = Figure(figsize=(6.4, 0.8 + 0.42 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(found))[::-1]
    for row, y in zip(found, places, strict=True):
        overall = row.splits["seen"]
        axes.plot([overall.low, overall.high], [y, y], color="#0072B2", linewidth=2)
        axes.plot(overall.mean, y, "o", color="#0072B2", label="shapes world, 95 %" if y == 0 else None)
        axes.plot(
            row.by_seed, [y - 0.2] * row.seeds, ".", color="#56B4E9", label="each seed" if y == 0 else None
        )
        if row.paper is not None:
            axes.plot(row.paper, y, "D", color="#D55E00", label="paper, GenEval" if y == 0 else None)
    axes.set_yticks(places, [row.name for row in found])
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of correct pictures")
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
