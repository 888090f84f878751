"""First phase of the tiny MLLM's training: the vision side alone learns to see.

A real MLLM starts from a ViT that has had contrastive pre-training on web images; the gradient of a caption
loss alone teaches a small ViT slowly. This phase stands in for that pre-training. The ViT and the projector,
that is what makes the 16 visual tokens, are supervised by linear heads that are thrown away afterwards:

    scenes   each visual token says what its sixteenth of the picture shows: where things cover it (8 x 8
             points), the shape there (or none), the colour there (a thing's, else the background's), how many
             things have their centre in it
    emoji    the mean of the visual tokens says which train emoji it is, and which pieces its label has

Shape suffixes: B batch, P visual tokens (16, row by row), D width, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from examples.tiny.mllm_data import SIDE_PX, Emoji, pixels, single_emoji
from examples.tiny.mllm_model import image_prefix
from examples.tiny.shape_scenes import COLOURS, SHAPES, Scene, draw_scene, sample_scene

CELLS = 4  # visual tokens along one side
GROUNDS = (*COLOURS, None)  # colour classes of a cell; None is white
POINTS = 8  # of the cover mask, along one side of a cell
MOST_CENTRES = 2  # a cell counts 0, 1, or 2 and more centres
NEAR = 0.09  # how far from a thing's rim a cell's middle still shows it, fraction of the side


@dataclass(frozen=True, kw_only=True)
class VisionTraining:
    """Settings of the vision phase; the defaults are those of the shipped model."""

    steps: int = 1200
    batch_scenes: int = 24
    batch_emoji: int = 8
    learning_rate: float = 1e-3
    warm_up_steps: int = 60
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CellTargets:
    """Class of every cell, int64 (B, P): index in (none, *SHAPES), in GROUNDS, and the count of centres.

    `cover_BPM` (0 or 1) says of 8 x 8 points in each cell whether a thing covers them.
    """

    shape_BP: torch.Tensor
    colour_BP: torch.Tensor
    centres_BP: torch.Tensor
    cover_BPM: torch.Tensor


def cover(scene: Scene) -> np.ndarray:
    """Which of 8 x 8 points of each cell a thing covers: (P, 64), 0 or 1."""
    inked = tuple(replace(thing, colour="black") for thing in scene.things)
    stencil = draw_scene(replace(scene, things=inked, background=None), CELLS * POINTS)
    dark_YX = (np.asarray(stencil.convert("L")) < 128).astype(np.float32)
    return dark_YX.reshape(CELLS, POINTS, CELLS, POINTS).transpose(0, 2, 1, 3).reshape(CELLS * CELLS, -1)


def cell_targets(scenes: Sequence[Scene]) -> CellTargets:
    """What each of the 4 x 4 cells of each scene shows: the thing nearest to its middle, if near enough."""
    shape_BP = np.zeros((len(scenes), CELLS * CELLS), dtype=np.int64)
    colour_BP, centres_BP = np.zeros_like(shape_BP), np.zeros_like(shape_BP)
    for row, scene in enumerate(scenes):
        colour_BP[row] = GROUNDS.index(scene.background)
        for thing in scene.things:
            cell = int(thing.y * CELLS) * CELLS + int(thing.x * CELLS)
            centres_BP[row, cell] = min(MOST_CENTRES, centres_BP[row, cell] + 1)
        for cell in range(CELLS * CELLS):
            x, y = (cell % CELLS + 0.5) / CELLS, (cell // CELLS + 0.5) / CELLS
            beyond = [math.hypot(t.x - x, t.y - y) - t.radius for t in scene.things]
            nearest = int(np.argmin(beyond))
            if beyond[nearest] < NEAR:
                shape_BP[row, cell] = 1 + SHAPES.index(scene.things[nearest].shape)
                colour_BP[row, cell] = GROUNDS.index(scene.things[nearest].colour)
    return CellTargets(
        shape_BP=torch.from_numpy(shape_BP),
        colour_BP=torch.from_numpy(colour_BP),
        centres_BP=torch.from_numpy(centres_BP),
        cover_BPM=torch.from_numpy(np.stack([cover(scene) for scene in scenes])),
    )


class VisionHeads(nn.Module):
    """The linear heads of this phase; kept only as long as it lasts."""

    def __init__(self, width: int, emoji: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.colour = nn.Linear(width, len(GROUNDS))
        self.centres = nn.Linear(width, 1 + MOST_CENTRES)
        self.cover = nn.Linear(width, POINTS * POINTS)
        self.instance = nn.Linear(width, emoji)
        self.pieces = nn.Linear(width, vocabulary)

    def scene_losses(self, tokens_BPD: torch.Tensor, targets: CellTargets) -> dict[str, torch.Tensor]:
        """Mean cross-entropy, in nats: per cell of shape, colour, number of centres; per point of cover."""
        tokens_BPD = self.norm(tokens_BPD)
        heads = {
            "shape": (self.shape, targets.shape_BP),
            "colour": (self.colour, targets.colour_BP),
            "centres": (self.centres, targets.centres_BP),
        }
        parts = {
            name: functional.cross_entropy(head(tokens_BPD).flatten(0, 1).float(), target_BP.flatten())
            for name, (head, target_BP) in heads.items()
        }
        covered_BPM = self.cover(tokens_BPD).float()
        parts["cover"] = functional.binary_cross_entropy_with_logits(covered_BPM, targets.cover_BPM)
        return parts

    def emoji_losses(
        self, tokens_BPD: torch.Tensor, which_B: torch.Tensor, pieces_BV: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy in nats: which emoji it is (smoothed by 0.1), and its label's pieces as a mixture."""
        mean_BD = self.norm(tokens_BPD).mean(dim=1)
        return {
            "instance": functional.cross_entropy(
                self.instance(mean_BD).float(), which_B, label_smoothing=0.1
            ),
            "pieces": functional.cross_entropy(self.pieces(mean_BD).float(), pieces_BV),
        }


def piece_mixtures(emoji: Sequence[Emoji], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """One row an emoji (N, V): equal shares for the distinct pieces of its label."""
    mixture_NV = torch.zeros(len(emoji), len(tokenizer))
    for row, one in enumerate(emoji):
        ids = sorted(set(tokenizer.encode(one.label, add_special_tokens=False)))
        mixture_NV[row, ids] = 1 / len(ids)
    return mixture_NV


def learning_rate(settings: VisionTraining, step: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth; `step` counts from 0."""
    if step < settings.warm_up_steps:
        return settings.learning_rate * (step + 1) / settings.warm_up_steps
    done = (step - settings.warm_up_steps) / max(1, settings.steps - settings.warm_up_steps)
    return settings.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def pretrain_vision(
    model: InternVLForConditionalGeneration,
    emoji: Sequence[Emoji],
    tokenizer: PreTrainedTokenizerBase,
    settings: VisionTraining,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Trains the ViT and the projector of `model` in place; the language model is not touched.

    Matrix products are in bf16, weights in fp32. Data are a function of (seed, step).
    Raises FloatingPointError when the loss is not finite.
    """
    torch.manual_seed(settings.seed)
    heads = VisionHeads(model.lm_head.in_features, len(emoji), len(tokenizer))
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    parameters = [*seeing, *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    mixture_NV = piece_mixtures(emoji, tokenizer)
    model.train()
    model.set_attn_implementation("eager")
    for step in range(settings.steps):
        rng = np.random.default_rng([settings.seed, step, 13])
        scenes = [sample_scene(rng) for _ in range(settings.batch_scenes)]
        which = rng.integers(len(emoji), size=settings.batch_emoji)
        pictures = [draw_scene(scene, SIDE_PX) for scene in scenes]
        pictures += [single_emoji(emoji[int(i)], rng).image for i in which]
        with torch.autocast("cpu", torch.bfloat16):
            tokens_BPD = image_prefix(model, pixels(pictures), [])
            parts = heads.scene_losses(tokens_BPD[: len(scenes)], cell_targets(scenes))
            parts |= heads.emoji_losses(tokens_BPD[len(scenes) :], torch.from_numpy(which), mixture_NV[which])
        loss = 2 * parts["shape"] + parts["colour"] + parts["centres"] + 2 * parts["cover"]
        loss = loss + 0.3 * (parts["instance"] + parts["pieces"])
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"vision loss is {loss.item()} at step {step}; it must be finite. Lower the vision phase's "
                f"learning_rate (now {settings.learning_rate})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, {name: float(part.detach()) for name, part in parts.items()})


def vision_weights(model: InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights of ViT and projector, by their names in the whole model."""
    inside = ("model.vision_tower.", "model.multi_modal_projector.")
    return {n: t.detach().clone() for n, t in model.state_dict().items() if n.startswith(inside)}


def add_vision(model: InternVLForConditionalGeneration, vision: dict[str, torch.Tensor]) -> None:
    """Puts the weights of the vision phase into `model`. Raises ValueError unless they are just those."""
    wanted = {name: tuple(t.shape) for name, t in vision_weights(model).items()}
    given = {name: tuple(t.shape) for name, t in vision.items()}
    if wanted != given:
        wrong = sorted(name for name, _ in wanted.items() ^ given.items())
        raise ValueError(
            f"the vision weights do not fit the model: {len(wrong)} differ, first {wrong[0]}. "
            "Train the vision phase with the same widths and layers, or leave --vision out."
        )
    model.load_state_dict(vision, strict=False)


def vision_phase(
    model: InternVLForConditionalGeneration,
    emoji: list[Emoji],
    tokenizer: PreTrainedTokenizerBase,
    rounds: Sequence[VisionTraining],
    file: Path | None,
    progress: Progress,
) -> None:
    """The vision phase on `model` in place: read from `file` if it exists, else trained and written to it.

    Every round starts its learning rate and its heads anew. Raises ValueError when the file comes of other
    rounds than these.
    """
    told_rounds = json.dumps([asdict(vision) for vision in rounds])
    if file is not None and file.exists():
        with safe_open(file, framework="pt") as inside:
            found = (inside.metadata() or {}).get("rounds")
        if found != told_rounds:
            raise ValueError(
                f"{file} comes of the vision rounds {found}, asked for are {told_rounds}. Give its "
                "--vision-steps and --seed, or another --vision file to train anew."
            )
        progress.console.print(f"vision phase: read from {file}")
        add_vision(model, load_file(file))
        return
    task = progress.add_task("vision", total=sum(vision.steps for vision in rounds))

    def on_step(step: int, parts: dict[str, float]) -> None:
        told = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
        progress.update(task, advance=1, description=f"vision {step}  {told}")

    for vision in rounds:
        pretrain_vision(model, emoji, tokenizer, vision, on_step)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(vision_weights(model), file, metadata={"rounds": told_rounds})
