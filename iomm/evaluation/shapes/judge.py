"""Whether pictures show what their prompts ask for, by GenEval's rule, and the benchmark's score.

GenEval calls a picture correct if every condition of its prompt holds: enough things of each shape; of those
the surest have the colour; the surest stand in the relation. What else is in the picture does not matter,
except in counting. Two things are stricter here, as nothing has to be allowed for a detector's errors: in
counting nothing unclear may be there, and `exact` says of every picture whether it shows what was asked for
and nothing else.

The score is GenEval's: the mean over the categories of the share of correct pictures.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iomm.evaluation.bootstrap import Interval, interval_of_means
from iomm.evaluation.shapes.detector import Detection, Found, detect
from iomm.evaluation.shapes.prompts import CATEGORIES, SPLITS, Category, Facts, Prompt, Split, noun
from iomm.evaluation.shapes.relations import relations
from iomm.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of one picture."""

    correct: bool
    exact: bool  # correct, and the picture shows nothing else
    reason: str  # why it is not exact; empty if it is
    detection: Detection


@dataclass(frozen=True, kw_only=True)
class SplitScore:
    """Scores of one split's prompts."""

    overall: Interval  # mean of the categories
    exact: Interval  # the same, of exact pictures
    categories: dict[Category, Interval]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of a benchmark, and of each picture why."""

    splits: dict[Split, SplitScore]
    images_per_prompt: int
    prompts: tuple[Prompt, ...]
    verdicts: tuple[Verdict, ...]  # prompt by prompt

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON, without the verdicts."""
        splits = {split: asdict(score) for split, score in self.splits.items()}
        return {"prompts": len(self.prompts), "images_per_prompt": self.images_per_prompt, "splits": splits}

    def lines(self) -> Iterable[dict[str, Any]]:
        """One record a picture: prompt, verdict, reason, and what was found."""
        for n, verdict in enumerate(self.verdicts):
            number, image = divmod(n, self.images_per_prompt)
            metadata = self.prompts[number].metadata()
            yield {"number": number, "image": image, **metadata, **asdict(verdict)}


def judge(facts: Facts, detection: Detection) -> Verdict:
    """Whether what was found in a picture is what was asked for."""
    wrong = [] if detection.background is not None else [detection.reason or "no background"]
    chosen: list[Found] = []
    for wanted in facts.wanted:
        having = [found for found in detection.objects if found.shape == wanted.shape]
        best = having[: wanted.count]
        chosen += best
        if len(having) < wanted.count:
            wrong.append(f"expected {noun(wanted)}, found {_of(wanted.shape, len(having))}")
        elif wanted.colour is not None and any(found.colour != wanted.colour for found in best):
            colours = " and ".join(found.colour or "unnamed" for found in best)
            wrong.append(f"expected {noun(wanted)}, found {colours}")
        elif facts.category == "counting" and len(having) > wanted.count:
            wrong.append(f"expected {noun(wanted)}, found {_of(wanted.shape, len(having))}")
    if facts.relation is not None and not wrong:
        first, second = chosen
        holding = relations(first.box, second.box)
        if facts.relation not in holding:
            seen = " and ".join(sorted(holding)) or "neither beside nor above"
            wrong.append(f"expected {first.shape} {facts.relation} {second.shape}, found {seen}")
    besides = _besides(facts, detection)
    if facts.category == "counting":
        wrong += [one for one in besides if one.startswith("unclear")]
    reason = "; ".join(wrong or besides)
    return Verdict(correct=not wrong, exact=not wrong and not besides, reason=reason, detection=detection)


def _of(shape: str, count: int) -> str:
    return f"{count} of {shape}"


def _besides(facts: Facts, detection: Detection) -> list[str]:
    """What a picture shows that was not asked for."""
    unclear = [f"unclear: {found.reason}" for found in detection.unclear]
    if detection.reason is not None:
        unclear.append(f"unclear: {detection.reason}")
    extra = len(detection.objects) - len(detection.unclear) - sum(wanted.count for wanted in facts.wanted)
    return [*unclear, f"{extra} things more than asked for"] if extra > 0 else unclear


def score(images_NHW3: np.ndarray, prompts: Sequence[Prompt], *, seed: int = 0) -> Score:
    """Judge the pictures of a benchmark.

    Args:
        images_NHW3: uint8 RGB, the same number for every prompt, prompt by prompt.
        prompts: of one or more splits.
        seed: of the bootstrap.
    Raises:
        ValueError: pictures and prompts do not go together, or no picture.
    """
    if not prompts or not len(images_NHW3) or len(images_NHW3) % len(prompts):
        raise ValueError(
            f"{len(images_NHW3)} pictures of {len(prompts)} prompts; every prompt needs the same number of "
            "pictures, at least one. Generate the missing ones."
        )
    images = len(images_NHW3) // len(prompts)
    verdicts = tuple(
        judge(prompts[n // images].facts, detect(image_HW3)) for n, image_HW3 in enumerate(images_NHW3)
    )
    correct_P, exact_P = (
        np.array([getattr(verdict, what) for verdict in verdicts], dtype=float).reshape(-1, images).mean(1)
        for what in ("correct", "exact")
    )
    splits: dict[Split, SplitScore] = {
        split: SplitScore(
            overall=interval_of_means([correct_P[p] for p in of.values()], seed=seed),
            exact=interval_of_means([exact_P[p] for p in of.values()], seed=seed),
            categories={c: interval_of_means([correct_P[p]], seed=seed) for c, p in of.items()},
        )
        for split, of in _numbers(prompts).items()
        if of
    }
    return Score(splits=splits, images_per_prompt=images, prompts=tuple(prompts), verdicts=verdicts)


def _numbers(prompts: Sequence[Prompt]) -> dict[Split, dict[Category, list[int]]]:
    """Numbers of the prompts, by split and category, in their own order."""
    numbers: dict[Split, dict[Category, list[int]]] = {split: {} for split in SPLITS}
    for category in CATEGORIES:
        for n, prompt in enumerate(prompts):
            if prompt.facts.category == category:
                numbers[prompt.split].setdefault(category, []).append(n)
    return numbers


def write_verdicts(found: Score, path: Path) -> None:
    """One JSON line a picture, whole or not at all."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in found.lines()))
