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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from iomm.checkpoint.generator import open_generator
from iomm.conditioning.adapter import ResidualQueryAdapter
from iomm.conditioning.prefix import Prefix
from iomm.data.loader import Loader
from iomm.encoders import Encoded, Encoders
from iomm.evaluation.heldout import EVAL_SEED, loss_by_timestep, masked_images
from iomm.evaluation.shapes.detector import detect
from iomm.evaluation.shapes.evaluation import save_sheet
from iomm.evaluation.shapes.prompts import Prompt, benchmark
from iomm.random import Stream
from iomm.sampling import finish, painting
from iomm.system import System

STEPS, GUIDANCE, BATCH = 25, 3.0, 32


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


@torch.no_grad()
def gains(system: System, encoders: Encoders, item: Encoded) -> list[Gain]:
    """What images and captions tell, with adapted and with fixed queries.

    Args:
        item: at least two samples with captions, encoded with `captioned_too`.
    Raises:
        ValueError: a system without adapter.
    """
    assert item.patches_BNF is not None
    of_others = item.patches_BNF.roll(1, 0)
    captions = [caption or encoders.prefixes.config.null_prompt for caption in item.batch.captions]
    prefixes = {
        "image": [masked_images(encoders, one) for one in (item, replace(item, patches_BNF=of_others))],
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
    noise_BLC = encoders.noise(EVAL_SEED, Stream.NOISE, item.batch.index_B)
    condition = system.condition(encoders.mllm, prefix)
    by_timestep = loss_by_timestep(system, item.latent_BLC, noise_BLC, condition)
    return float(by_timestep[1:].mean()) / len(noise_BLC)


def paint(system: System, encoders: Encoders, item: Encoded, prompts: Sequence[str]) -> np.ndarray:
    """Pictures of prompts, guided against the null of image samples: uint8 (N, H, W, 3).

    Args:
        item: has patch tokens, all of which the null masks.
    """
    assert item.patches_BNF is not None
    parts = []
    for first in range(0, len(prompts), BATCH):
        texts = prompts[first : first + BATCH]
        patches_BNF = item.patches_BNF[:1].expand(len(texts), -1, -1)
        all_masked = torch.zeros(patches_BNF.shape[:2], dtype=torch.bool)
        null = encoders.prefixes.for_images(patches_BNF, all_masked)
        task = painting(system, encoders, texts, seed=0, guidance=GUIDANCE, first=first, null=null)
        parts.append(finish(system, encoders, task, steps=STEPS).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


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
        adapted = paint(system, encoders, item, texts)
        with fixed_queries(system, masked_images(encoders, item)):
            fixed = paint(system, encoders, item, texts)
        for queries, pictures in (("adapted", adapted), ("fixed", fixed)):
            painted += [
                f"| {run.name} | {queries} | {h.named} | {h.prompts} | {h.share:.2f} | {h.chance:.2f} |"
                for h in hits(pictures, prompts)
            ]
            save_sheet(pictures, texts, options.paint / f"{run.name}-{queries}.png")
    sys.stdout.write("\n".join([*losses, "", *(painted if options.paint is not None else []), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
