"""What a caption tells a trained generator, also one that never saw a caption, and whether its query adapter
is in the way.

    python -m tools.caption_gain RUN... [--pairs 96]     (repository root, a minute of one core a run)
    python -m tools.caption_gain RUN... --paint OUT      also pictures, of a run on the shapes world (minutes)

*Gain*: the held-out velocity loss (EMA weights, the fixed noise of `heldout_loss`, mean over its timesteps
but the smallest) under the condition of each sample's own masked image or own caption, and under that of
another sample. Their ratio is what the generator takes from the condition. Unlike a comparison with the null
prompt it also judges runs that never saw a prompt.

*Hits*: the shapes world's prompts are painted, guided against the null condition of image samples, which
every run has seen; a hit is a picture that has all the colours (or shapes) that its prompt names, whatever
else is wrong. By chance: the same pictures held against the other prompts.

Both once more with the adapter's queries held fixed, at their mean over the masked images: an adapter that
read nothing but patch tokens in training may make nonsense of words, while the MLLM's states still tell the
generator what they say.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from iomm.checkpoint.generator import open_generator
from iomm.conditioning.adapter import ResidualQueryAdapter
from iomm.conditioning.mask import keep_tokens
from iomm.conditioning.prefix import Prefix
from iomm.data.loader import Loader
from iomm.encoders import Encoded, Encoders
from iomm.evaluation.grid import image_grid, save_png
from iomm.evaluation.heldout import EVAL_SEED
from iomm.evaluation.shapes.detector import detect
from iomm.evaluation.shapes.prompts import Prompt, benchmark
from iomm.flow.loss import velocity_loss
from iomm.flow.path import interpolate, velocity_target
from iomm.flow.sampler import Guided, Velocity, sample
from iomm.flow.timesteps import evaluation_timesteps
from iomm.random import Stream
from iomm.system import Condition, System

STEPS, GUIDANCE, BATCH, SHOWN = 25, 3.0, 32, 48


@dataclass(frozen=True)
class Gain:
    """Losses under one kind of condition."""

    condition: str  # image, caption
    queries: str  # adapted: as trained; fixed: the same for all
    own: float
    other: float

    @property
    def percent(self) -> float:
        """How far the loss falls when the condition is the sample's own."""
        return 100 * (1 - self.own / self.other)


@dataclass(frozen=True)
class Hits:
    """Of the prompts that name so much: the share of pictures that have it, and by chance."""

    named: str
    prompts: int
    share: float
    chance: float


def adapter_of(system: System) -> ResidualQueryAdapter:
    """Raises:
    ValueError: a system without adapter.
    """
    if system.conditioner is None or system.conditioner.adapter is None:
        raise ValueError("the run has no query adapter (condition.queries is 0): nothing to hold fixed.")
    return system.conditioner.adapter


@contextmanager
def fixed_queries(system: System, prefix: Prefix) -> Iterator[None]:
    """While entered, the adapter reads nothing: its queries are their mean over the samples of `prefix`."""
    adapter = adapter_of(system)
    with torch.no_grad():
        mean_QD = adapter(*prefix.read).mean(0)
    hook = adapter.register_forward_hook(lambda _adapter, _read, q_BQD: mean_QD.expand_as(q_BQD))
    try:
        yield
    finally:
        hook.remove()


def masked_images(encoders: Encoders, item: Encoded, roll: int = 0) -> Prefix:
    """The condition of each sample's own image, masked, or of the one so many samples before it."""
    assert item.patches_BNF is not None, "samples are encoded with captioned_too=True"
    builder, tokens = encoders.prefixes, encoders.mllm.image_tokens
    keep_BN = keep_tokens(EVAL_SEED, item.batch.index_B, tokens, builder.config.mask_ratio)
    return builder.for_images(item.patches_BNF.roll(roll, 0), keep_BN)


@torch.no_grad()
def gains(system: System, encoders: Encoders, item: Encoded) -> list[Gain]:
    """What images and captions tell, with adapted and with fixed queries.

    Args:
        item: at least two samples with captions, encoded with `captioned_too`.
    Raises:
        ValueError: a system without adapter.
    """
    captions = [caption or encoders.prefixes.config.null_prompt for caption in item.batch.captions]
    prefixes = {
        "image": [masked_images(encoders, item, roll) for roll in (0, 1)],
        "caption": [encoders.prefixes.for_text(texts) for texts in (captions, captions[-1:] + captions[:-1])],
    }

    def measure(queries: str) -> list[Gain]:
        return [
            Gain(condition, queries, *(_loss(system, encoders, item, prefix) for prefix in both))
            for condition, both in prefixes.items()
        ]

    adapted = measure("adapted")
    with fixed_queries(system, prefixes["image"][0]):
        return [*adapted, *measure("fixed")]


def _loss(system: System, encoders: Encoders, item: Encoded, prefix: Prefix) -> float:
    condition = system.condition(encoders.mllm, prefix)
    x_BLC, noise_BLC = item.latent_BLC, encoders.noise(EVAL_SEED, Stream.NOISE, item.batch.index_B)
    losses = []
    for t in evaluation_timesteps()[1:].tolist():
        t_B = torch.full((len(x_BLC),), t, device=x_BLC.device)
        velocity_BLC = system.velocity(interpolate(x_BLC, noise_BLC, t_B), t_B, condition)
        losses.append(float(velocity_loss(velocity_BLC, velocity_target(x_BLC, noise_BLC)).mean()))
    return sum(losses) / len(losses)


@torch.no_grad()
def paint(system: System, encoders: Encoders, prompts: Sequence[str], steps: int = STEPS) -> np.ndarray:
    """Pictures of prompts, guided against the null of image samples: uint8 (N, H, W, 3)."""
    builder, mllm = encoders.prefixes, encoders.mllm
    height, width = (side * encoders.codec.token_px for side in encoders.grid)
    parts = []
    for first in range(0, len(prompts), BATCH):
        texts = prompts[first : first + BATCH]
        blank = torch.zeros(len(texts), 3, height, width, dtype=torch.uint8)
        all_masked = torch.zeros(len(texts), mllm.image_tokens, dtype=torch.bool)
        null = builder.for_images(mllm.vision(blank.to(mllm.device)), all_masked)
        both = [system.condition(mllm, prefix) for prefix in (builder.for_text(texts), null)]
        with_text, without = (_velocity(system, condition) for condition in both)
        noise_BLC = encoders.noise(0, Stream.SAMPLE, torch.arange(first, first + len(texts)))
        guided, shift = Guided(with_text, without, GUIDANCE), system.config.flow.shift
        x_BLC = sample(guided, noise_BLC, steps=steps, method="euler", shift=shift).x_BLC
        parts.append(encoders.codec.decode(x_BLC).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def _velocity(system: System, condition: Condition) -> Velocity:
    return lambda x_BLC, t_B: system.velocity(x_BLC, t_B, condition)


def hits(pictures_NHW3: np.ndarray, prompts: Sequence[Prompt]) -> list[Hits]:
    """How often what prompts name is in their pictures."""
    things = [detect(picture_HW3).objects for picture_HW3 in pictures_NHW3]
    wanted = [prompt.facts.wanted for prompt in prompts]
    colours = [{one.colour for one in some if one.colour is not None} for some in wanted]
    shapes = [{one.shape for one in some} for some in wanted]
    has_colours = [{thing.colour for thing in found} for found in things]
    has_shapes = [{thing.shape for thing in found} for found in things]
    return [
        _count("one colour", colours, has_colours, 1),
        _count("two colours", colours, has_colours, 2),
        _count("one shape", shapes, has_shapes, 1),
        _count("two shapes", shapes, has_shapes, 2),
    ]


def _count[T](what: str, named: Sequence[set[T]], found: Sequence[set[T | None]], number: int) -> Hits:
    """Of the prompts that name so many: hits, and the mean over all ways to shift pictures against them."""
    pairs = [(names, has) for names, has in zip(named, found, strict=True) if len(names) == number]
    names, has = [names for names, _ in pairs], [has for _, has in pairs]
    size = len(pairs)
    shares = [sum(names[n] <= has[(n + shift) % size] for n in range(size)) / size for shift in range(size)]
    return Hits(what, size, shares[0], sum(shares[1:]) / max(1, size - 1))


def main(arguments: Sequence[str]) -> int:
    """Print tables of all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--pairs", type=int, default=96, help="held-out samples (96)")
    parser.add_argument("--paint", type=Path, metavar="OUT", help="paint the shapes world's prompts, too")
    parser.add_argument("--per-category", type=int, default=40, help="prompts, in each category (40)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    losses = ["| run | condition | queries | own | another's | gain |", "|---|---|---|---|---|---|"]
    painted = ["| run | queries | named | prompts | hits | by chance |", "|---|---|---|---|---|---|"]
    prompts = benchmark(options.per_category)
    for run in options.runs:
        config, encoders, system = open_generator(run, ema=True)
        batch = Loader(config.data, 0, on_bad=print).heldout(options.pairs)
        item = encoders.encode(batch, captioned_too=True)
        losses += [
            f"| {run.name} | {g.condition} | {g.queries} | {g.own:.3f} | {g.other:.3f} | {g.percent:.1f} % |"
            for g in gains(system, encoders, item)
        ]
        if options.paint is None:
            continue
        options.paint.mkdir(parents=True, exist_ok=True)
        texts = [prompt.text for prompt in prompts]
        adapted = paint(system, encoders, texts)
        with fixed_queries(system, masked_images(encoders, item)):
            fixed = paint(system, encoders, texts)
        for queries, pictures in (("adapted", adapted), ("fixed", fixed)):
            painted += [
                f"| {run.name} | {queries} | {h.named} | {h.prompts} | {h.share:.2f} | {h.chance:.2f} |"
                for h in hits(pictures, prompts)
            ]
            spread = np.linspace(0, len(texts) - 1, min(SHOWN, len(texts))).round().astype(int)
            sheet = torch.from_numpy(pictures[spread]).permute(0, 3, 1, 2)
            grid = image_grid(sheet, 8, [texts[n] for n in spread])
            save_png(grid, options.paint / f"{run.name}-{queries}.png")
    sys.stdout.write("\n".join([*losses, "", *(painted if options.paint is not None else []), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
