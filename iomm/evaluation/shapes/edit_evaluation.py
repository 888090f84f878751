"""The edit benchmark of a system: draw scenes, have them edited, judge the pictures, write what came out.

OUT/edits.json           scores with intervals, by action, and what they were taken with
OUT/edit_verdicts.jsonl  one line an edit: instruction, verdict, reason, what was found
OUT/edits.npy            the edited pictures, uint8 (N, H, W, 3)
OUT/edits.png            the first of them, each beside its source
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iomm
from iomm.conditioning.mask import keep_tokens
from iomm.encoders import Encoders
from iomm.evaluation.grid import image_grid, save_png
from iomm.evaluation.scores import write_json
from iomm.evaluation.shapes.edit_score import EditScore, score_edits
from iomm.evaluation.shapes.edits import ACTIONS, EditCase, draw_edit
from iomm.evaluation.shapes.evaluation import said
from iomm.evaluation.shapes.scene import render
from iomm.files import write_whole
from iomm.flow.sampler import Method
from iomm.sampling import edit
from iomm.system import System

_SHOWN = 24  # edits on the sheet


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """How the benchmark is taken."""

    per_action: int = 40
    seed: int = 0  # of scenes, masks, noise and bootstrap
    steps: int = 25
    mask_ratio: float = 0.5
    image_guidance: float = 1.5
    text_guidance: float = 3.0
    aux_prompt: bool = False
    method: Method = "euler"
    batch_images: int = 32


@dataclass(frozen=True, kw_only=True)
class Edited:
    """Edit n is task n of (seed, n), with the mask and the noise of (seed, n)."""

    cases: tuple[EditCase, ...]
    sources_NHW3: np.ndarray  # uint8
    images_NHW3: np.ndarray  # uint8
    score: EditScore


def evaluate_edits(system: System, encoders: Encoders, options: EditOptions) -> Edited:
    """Edits by a whole system in evaluation mode, and their score.

    Raises:
        ValueError: not one edit was asked for.
    """
    cases = tuple(draw_edit(options.seed, n) for n in range(options.per_action * len(ACTIONS)))
    if not cases:
        raise ValueError(f"{options.per_action} edits of each action are none; ask for at least one.")
    sources_NHW3 = np.stack([render(case.source, system.config.data.image_px) for case in cases])
    keep_NT = keep_tokens(
        options.seed, torch.arange(len(cases)), encoders.mllm.image_tokens, options.mask_ratio
    )
    parts = []
    for first in range(0, len(cases), options.batch_images):
        part = slice(first, first + options.batch_images)
        pictures_BCHW = edit(
            system,
            encoders,
            torch.from_numpy(sources_NHW3[part]).permute(0, 3, 1, 2),
            [case.text for case in cases[part]],
            keep_NT[part],
            seed=options.seed,
            steps=options.steps,
            image_guidance=options.image_guidance,
            text_guidance=options.text_guidance,
            aux_prompt=options.aux_prompt,
            method=options.method,
            first=first,
        )
        parts.append(pictures_BCHW.permute(0, 2, 3, 1).cpu().numpy())
    images_NHW3 = np.concatenate(parts)
    found = score_edits(images_NHW3, cases, seed=options.seed)
    return Edited(cases=cases, sources_NHW3=sources_NHW3, images_NHW3=images_NHW3, score=found)


def write_edits(folder: Path, edited: Edited, options: EditOptions, about: dict[str, Any]) -> None:
    """Write what the benchmark came to.

    Args:
        about: what was evaluated: checkpoint, step, weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "edits.npy", edited.images_NHW3)
    verdicts = edited.score.verdicts
    pairs_NHW3 = np.stack((edited.sources_NHW3, edited.images_NHW3), axis=1)[:_SHOWN]
    captions = [
        caption
        for case, verdict in zip(edited.cases[:_SHOWN], verdicts, strict=False)
        for caption in (case.text, "+" if verdict.correct else f"- {verdict.reason}")
    ]
    sheet_NCHW = torch.from_numpy(pairs_NHW3.reshape(-1, *pairs_NHW3.shape[2:])).permute(0, 3, 1, 2)
    save_png(image_grid(sheet_NCHW, 8, captions), folder / "edits.png")
    lines = [
        {"number": n, "instruction": case.text, **asdict(case.edit), **asdict(verdict)}
        for n, (case, verdict) in enumerate(zip(edited.cases, verdicts, strict=True))
    ]
    write_whole(folder / "edit_verdicts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    scores = asdict(edited.score)
    del scores["verdicts"]
    record = {**about, "iomm": iomm.__version__, "options": asdict(options), **scores}
    write_json(folder / "edits.json", record)


def describe_edits(found: EditScore) -> str:
    """The scores as a small table."""
    rows = {"edits overall": found.overall, **{f"  {action}": of for action, of in found.actions.items()}}
    rows |= {"reached": found.reached, "rest kept": found.kept}
    return "".join(f"{name:17} {said(interval)}\n" for name, interval in rows.items())
