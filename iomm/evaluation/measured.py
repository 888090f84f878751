"""What evaluations of a run came to, as the report's page shows it: benchmark tables, reconstruction."""

from collections.abc import Iterator
from dataclasses import dataclass

from iomm.evaluation import figures
from iomm.evaluation.bootstrap import Interval
from iomm.evaluation.scores import BenchScore, Reconstruction

MAX_OLDER = 20  # older scores listed of one benchmark


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score with its interval, and where they lie between 0 and the best score, in percent."""

    name: str
    score: Interval
    low_percent: float
    high_percent: float


@dataclass(frozen=True, kw_only=True)
class BenchSection:
    """A benchmark on the page: its newest score in parts, the older ones in a line each."""

    newest: BenchScore
    rows: list[ScoreRow]
    older: list[BenchScore]
    older_left_out: int
    trend: figures.Picture | None  # overall score over steps; None with fewer than two alike


@dataclass(frozen=True, kw_only=True)
class ReconstructionSection:
    """Reconstruction on the page."""

    found: Reconstruction
    picture: figures.Picture
    rows: list[tuple[float, Interval, float | None]]  # mask ratio, PSNR in dB, dB above the null condition
    gain_db: float | None  # of the lowest mask ratio against the null condition; None: no ratio of 1


def bench_sections(scores: dict[str, list[BenchScore]]) -> list[BenchSection]:
    """A section a benchmark.

    Args:
        scores: by benchmark, newest first, at least one each.
    """
    return [
        BenchSection(
            newest=newest,
            rows=list(_rows(newest)),
            older=older[:MAX_OLDER],
            older_left_out=len(older[MAX_OLDER:]),
            trend=_trend(newest, older),
        )
        for newest, *older in scores.values()
    ]


def reconstruction_section(found: Reconstruction) -> ReconstructionSection:
    """The curve and its table."""
    null = dict(zip(found.ratios, found.psnr_db, strict=True)).get(1.0)

    def above(interval: Interval) -> float | None:
        return None if null is None else interval.mean - null.mean

    return ReconstructionSection(
        found=found,
        picture=figures.reconstruction_curve(found),
        rows=[(r, db, above(db)) for r, db in zip(found.ratios, found.psnr_db, strict=True)],
        gain_db=above(found.psnr_db[0]),
    )


def _rows(score: BenchScore) -> Iterator[ScoreRow]:
    for name, interval in {"overall": score.overall, **score.parts}.items():
        low, high = (100 * min(max(v / score.best, 0.0), 1.0) for v in (interval.low, interval.high))
        yield ScoreRow(name=name, score=interval, low_percent=low, high_percent=high)


def _trend(newest: BenchScore, older: list[BenchScore]) -> figures.Picture | None:
    """Of the scores that were taken as the newest was, the latest of each step."""
    alike: dict[int, BenchScore] = {}
    for score in (newest, *older):
        same = (score.judge, score.settings, score.prompts, score.images_per_prompt) == (
            newest.judge,
            newest.settings,
            newest.prompts,
            newest.images_per_prompt,
        )
        if same:
            alike.setdefault(score.step, score)
    return figures.score_curve([alike[step] for step in sorted(alike)]) if len(alike) > 1 else None
