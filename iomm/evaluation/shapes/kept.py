"""The scores of the shapes world as a run's folder keeps them for its report."""

from typing import Any

from iomm.evaluation.scores import BenchScore
from iomm.evaluation.shapes.edit_evaluation import EditOptions
from iomm.evaluation.shapes.edit_score import EditScore
from iomm.evaluation.shapes.evaluation import EvaluationOptions, prompts_digest
from iomm.evaluation.shapes.judge import Score

JUDGE = "exact detector of the shapes world"


def shapes_scores(found: Score, options: EvaluationOptions, about: dict[str, Any]) -> list[BenchScore]:
    """A score a split.

    Args:
        about: `step` of the checkpoint, and whether its weights are the `ema`.
    """
    settings = {name: getattr(options, name) for name in ("guidance", "steps", "method", "seed")}
    settings |= {"weights": _weights(about), "prompts": prompts_digest(found.prompts)[:8]}
    return [
        BenchScore(
            bench=f"shapes, {_words(split)}",
            step=about["step"],
            prompts=sum(prompt.split == split for prompt in found.prompts),
            images_per_prompt=found.images_per_prompt,
            judge=JUDGE,
            best=1.0,
            settings=settings,
            overall=of.overall,
            parts={_words(name): interval for name, interval in of.categories.items()}
            | {"nothing else shown": of.exact},
        )
        for split, of in found.splits.items()
    ]


def edit_scores(found: EditScore, options: EditOptions, about: dict[str, Any]) -> list[BenchScore]:
    """The one score of the edits; `about` as for `shapes_scores`."""
    names = ("mask_ratio", "image_guidance", "text_guidance", "aux_prompt", "steps", "method", "seed")
    settings = {_words(name): getattr(options, name) for name in names} | {"weights": _weights(about)}
    return [
        BenchScore(
            bench="shapes, edits",
            step=about["step"],
            prompts=len(found.verdicts),
            images_per_prompt=1,
            judge=JUDGE,
            best=1.0,
            settings=settings,
            overall=found.overall,
            parts={_words(action): interval for action, interval in found.actions.items()}
            | {"reached": found.reached, "rest kept": found.kept},
        )
    ]


def _weights(about: dict[str, Any]) -> str:
    return "EMA" if about["ema"] else "last"


def _words(name: str) -> str:
    return name.replace("_", " ")
