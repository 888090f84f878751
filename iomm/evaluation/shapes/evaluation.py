"""The shapes benchmark of a system: paint its prompts, judge the pictures, write what came out.

OUT/scores.json       scores with intervals, by split and category, and what they were taken with
OUT/verdicts.jsonl    one line a picture: prompt, verdict, reason, what was found
OUT/pictures.npy      the pictures, uint8 (N, H, W, 3), prompt by prompt
OUT/pictures.png      the first of them with their prompts
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iomm
from iomm.encoders import Encoders
from iomm.evaluation.bootstrap import Interval
from iomm.evaluation.grid import image_grid, save_png
from iomm.evaluation.scores import write_json
from iomm.evaluation.shapes.judge import Score, score, write_verdicts
from iomm.evaluation.shapes.prompts import Prompt, benchmark
from iomm.flow.sampler import Method
from iomm.sampling import paint
from iomm.system import System

_SHOWN = 48  # pictures on the sheet


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How the benchmark is taken."""

    per_category: int = 40  # prompts, in each category of each split
    images_per_prompt: int = 1
    seed: int = 0  # of prompts, noise and bootstrap
    steps: int = 25
    guidance: float = 3.0
    method: Method = "euler"
    batch_images: int = 32


def evaluate_shapes(
    system: System,
    encoders: Encoders,
    options: EvaluationOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> tuple[Score, np.ndarray]:
    """The score of a whole system in evaluation mode, and the pictures (uint8, (N, H, W, 3)).

    Picture n is of prompt n // images_per_prompt and starts from the noise of (seed, n).

    Raises:
        ValueError: there are not as many prompts, or the system's pictures are no squares.
    """
    prompts = benchmark(options.per_category, seed=options.seed)
    texts = [prompt.text for prompt in prompts for _ in range(options.images_per_prompt)]
    parts = []
    for first in range(0, len(texts), options.batch_images):
        part = texts[first : first + options.batch_images]
        pictures_BCHW = paint(
            system,
            encoders,
            part,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            method=options.method,
            first=first,
        )
        parts.append(pictures_BCHW.permute(0, 2, 3, 1).cpu().numpy())
        on_progress(first + len(part), len(texts))
    images_NHW3 = np.concatenate(parts)
    return score(images_NHW3, prompts, seed=options.seed), images_NHW3


def write_evaluation(
    folder: Path,
    found: Score,
    images_NHW3: np.ndarray,
    options: EvaluationOptions,
    about: dict[str, Any],
) -> None:
    """Write what an evaluation came to.

    Args:
        about: what was evaluated: checkpoint, step, weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", images_NHW3)
    captions = [
        f"{'+' if verdict.correct else '-'} {found.prompts[n // found.images_per_prompt].text}"
        for n, verdict in enumerate(found.verdicts)
    ]
    save_sheet(images_NHW3, captions, folder / "pictures.png")
    write_verdicts(found, folder / "verdicts.jsonl")
    record = {
        **about,
        "iomm": iomm.__version__,
        "options": asdict(options),
        "prompts_sha256": prompts_digest(found.prompts),
        **found.to_dict(),
    }
    write_json(folder / "scores.json", record)


def save_sheet(images_NHW3: np.ndarray, captions: Sequence[str], path: Path) -> None:
    """Some of the pictures, spread evenly over them, with their captions."""
    places = np.linspace(0, len(images_NHW3) - 1, min(_SHOWN, len(images_NHW3))).round()
    spread = [int(n) for n in places]
    sheet = torch.from_numpy(images_NHW3[spread]).permute(0, 3, 1, 2)
    save_png(image_grid(sheet, 8, [captions[n] for n in spread]), path)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Of all texts and what is wanted of them: equal if two scores are of the same prompts."""
    return hashlib.sha256(json.dumps([prompt.metadata() for prompt in prompts]).encode()).hexdigest()


def weights_digest(system: System) -> str:
    """Of the weights that paint: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in system.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def describe(found: Score) -> str:
    """The scores as a small table."""
    rows = []
    for split, of in found.splits.items():
        rows.append(f"{split:17} overall         {said(of.overall)}")
        rows += [f"{'':17} {category:15} {said(interval)}" for category, interval in of.categories.items()]
        rows.append(f"{'':17} nothing else    {said(of.exact)}")
    return "\n".join(rows) + "\n"


def said(interval: Interval) -> str:
    """A score with its interval."""
    return f"{interval.mean:.3f}  [{interval.low:.3f}, {interval.high:.3f}]"
