"""From judged items to a benchmark's score: counted against what was generated, weighted, with intervals."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from iomm.evaluation.benches.layout import Bench, BenchError, named
from iomm.evaluation.bootstrap import Interval, interval_of_means


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a judge said of each prompt, by key."""

    scores: Mapping[str, float]  # in the benchmark's own unit
    unparsed: tuple[str, ...] = ()  # judged, but the verdict could not be read
    categories: Mapping[str, str] | None = None  # as the judge's file says them
    known_lost: tuple[str, ...] = ()  # what the official scorer always loses
    reported: float | None = None  # the overall score that the scorer printed, of all that it judged
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """A benchmark's score."""

    bench: str
    overall: Interval
    categories: dict[str, Interval]
    prompts: int  # generated
    scored: int
    unparsed: tuple[str, ...]  # keys; no part of any score
    lost: tuple[str, ...]  # keys that the official scorer does not judge
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def prompt_means(images: Mapping[str, Mapping[str, float]], wanted: int) -> dict[str, float]:
    """One number a prompt: the mean of its images.

    Raises:
        BenchError: a prompt with another number of judged images than `wanted`.
    """
    wrong = [f"{key} ({len(of)})" for key, of in sorted(images.items()) if len(of) != wanted]
    if wrong:
        raise BenchError(
            f"{len(wrong)} prompts have not {wanted} judged images: {named(wrong)}. Run the scorer on the "
            "whole folder."
        )
    return {key: float(np.mean(list(of.values()))) for key, of in images.items()}


def summarise(bench: Bench, generated: Mapping[str, str], reading: Reading, *, seed: int = 0) -> Result:
    """The score of what was judged.

    Args:
        generated: the category of every prompt that was generated, by key.
        seed: of the bootstrap.
    Raises:
        BenchError: prompts without a verdict, verdicts without a prompt, other categories than were
            generated, a category of which nothing could be read, or another overall score than the scorer
            printed.
    """
    judged = reading.scores.keys() | set(reading.unparsed)
    lost = tuple(key for key in reading.known_lost if key in generated and key not in judged)
    missing = sorted(generated.keys() - judged - set(lost))
    if missing:
        which = " Or is it the first of dpg_bench.csv, which its scorer skips? Then give --questions."
        raise BenchError(
            f"{len(missing)} of {len(generated)} generated prompts were not judged: {named(missing)}. A "
            "score of the rest would be another benchmark's; run the scorer on all."
            f"{which if bench.name == 'dpg' and len(missing) == 1 else ''}"
        )
    extra = sorted(judged - generated.keys())
    if extra:
        raise BenchError(
            f"{len(extra)} judged prompts were never generated: {named(extra)}. Give the right results."
        )
    _same_categories(generated, reading)
    _as_reported(reading)
    groups = _grouped(bench, generated, reading)
    shares = None if bench.weights is None else [bench.weights[category] for category in groups]
    return Result(
        bench=bench.name,
        overall=interval_of_means(list(groups.values()), weights=shares, seed=seed),
        categories={c: interval_of_means([scores], seed=seed) for c, scores in groups.items()},
        prompts=len(generated),
        scored=len(reading.scores),
        unparsed=tuple(sorted(reading.unparsed)),
        lost=lost,
        notes=reading.notes,
    )


def describe(result: Result) -> str:
    """The score as a small table."""
    rows = [("overall", result.overall), *result.categories.items()]
    lines = [f"{result.bench}: {result.scored} of {result.prompts} prompts scored"]
    lines += [f"{name:24} {of.mean:8.4f}  [{of.low:.4f}, {of.high:.4f}]" for name, of in rows]
    if result.unparsed:
        lines.append(f"unparsed, in no score: {len(result.unparsed)} ({named(result.unparsed)})")
    if result.lost:
        lines.append(f"never judged by the official scorer: {named(result.lost)}")
    return "\n".join((*lines, *result.notes)) + "\n"


def _grouped(bench: Bench, generated: Mapping[str, str], reading: Reading) -> dict[str, np.ndarray]:
    """Scores by category, in the order of the benchmark's weights."""
    present = list(dict.fromkeys(generated.values()))  # a subset need not have all categories
    names = present if bench.weights is None else [name for name in bench.weights if name in present]
    groups = {
        name: np.array(
            [reading.scores[k] for k, of in generated.items() if of == name and k in reading.scores]
        )
        for name in names
    }
    empty = [name for name, scores in groups.items() if len(scores) == 0]
    if empty:
        raise BenchError(
            f"nothing in {', '.join(empty)} has a score, so {bench.name} has none. Look at what the judge "
            "answered."
        )
    return groups


def _same_categories(generated: Mapping[str, str], reading: Reading) -> None:
    other = [k for k, said in (reading.categories or {}).items() if generated.get(k, said) != said]
    if other:
        raise BenchError(
            f"{len(other)} results are of another category than what was generated: {named(sorted(other))}. "
            "Give the results of this folder."
        )


def _as_reported(reading: Reading) -> None:
    if reading.reported is None:
        return
    mean = float(np.mean(list(reading.scores.values())))
    if abs(mean - reading.reported) > 1e-4:
        raise BenchError(
            f"the scorer printed {reading.reported:.6f}, its lines have a mean of {mean:.6f}: lines of "
            "another run are in the file, or some are missing. Score into a new file."
        )
