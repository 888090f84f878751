"""How much of a picture its caption tells a trained generator, and whether its query adapter is in the way.

    python -m tools.caption_gain RUN... [--pairs 96]     (repository root, a minute of one core a run)

The held-out velocity loss (EMA weights, the fixed noise of `heldout_loss`, mean over its timesteps but the
smallest) under the condition of each sample's own masked image or own caption, and under that of another
sample. Their ratio is what the generator takes from the condition. Unlike a comparison with the null prompt
it also judges runs that never saw a prompt.

Then once more with the adapter's queries held fixed, at their mean over the masked images: an adapter that
read nothing but patch tokens in training may make nonsense of words, while the MLLM's states still tell the
generator what they say.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from iomm.checkpoint.generator import open_generator
from iomm.conditioning.mask import keep_tokens
from iomm.conditioning.prefix import Prefix
from iomm.data.loader import Loader
from iomm.encoders import Encoded, Encoders
from iomm.evaluation.heldout import EVAL_SEED
from iomm.flow.loss import velocity_loss
from iomm.flow.path import interpolate, velocity_target
from iomm.flow.timesteps import evaluation_timesteps
from iomm.random import Stream
from iomm.system import System


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


@torch.no_grad()
def gains(system: System, encoders: Encoders, item: Encoded) -> list[Gain]:
    """What images and captions tell, with adapted and with fixed queries.

    Args:
        item: at least two samples with captions, encoded with `captioned_too`.
    Raises:
        ValueError: a system without adapter.
    """
    conditioner = system.conditioner
    if conditioner is None or conditioner.adapter is None:
        raise ValueError("the run has no query adapter (condition.queries is 0): nothing to hold fixed.")
    assert item.patches_BNF is not None
    builder, adapter, batch = encoders.prefixes, conditioner.adapter, item.batch
    keep_BN = keep_tokens(EVAL_SEED, batch.index_B, encoders.mllm.image_tokens, builder.config.mask_ratio)
    captions = [caption or builder.config.null_prompt for caption in batch.captions]
    of_others = item.patches_BNF.roll(1, 0)
    prefixes = {
        "image": [builder.for_images(patches_BNF, keep_BN) for patches_BNF in (item.patches_BNF, of_others)],
        "caption": [builder.for_text(texts) for texts in (captions, captions[-1:] + captions[:-1])],
    }
    fixed_QD = adapter(*prefixes["image"][0].read).mean(0)

    def measure(queries: str) -> list[Gain]:
        return [
            Gain(condition, queries, *(_loss(system, encoders, item, prefix) for prefix in both))
            for condition, both in prefixes.items()
        ]

    adapted = measure("adapted")
    hook = adapter.register_forward_hook(lambda _adapter, _read, q_BQD: fixed_QD.expand_as(q_BQD))
    try:
        return [*adapted, *measure("fixed")]
    finally:
        hook.remove()


def _loss(system: System, encoders: Encoders, item: Encoded, prefix: Prefix) -> float:
    condition = system.condition(encoders.mllm, prefix)
    x_BLC, noise_BLC = item.latent_BLC, encoders.noise(EVAL_SEED, Stream.NOISE, item.batch.index_B)
    losses = []
    for t in evaluation_timesteps()[1:].tolist():
        t_B = torch.full((len(x_BLC),), t, device=x_BLC.device)
        velocity_BLC = system.velocity(interpolate(x_BLC, noise_BLC, t_B), t_B, condition)
        losses.append(float(velocity_loss(velocity_BLC, velocity_target(x_BLC, noise_BLC)).mean()))
    return sum(losses) / len(losses)


def main(arguments: Sequence[str]) -> int:
    """Print a table of all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--pairs", type=int, default=96, help="held-out samples (96)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = ["| run | condition | queries | own | another's | gain |", "|---|---|---|---|---|---|"]
    for run in options.runs:
        config, encoders, system = open_generator(run, ema=True)
        batch = Loader(config.data, 0, on_bad=print).heldout(options.pairs)
        item = encoders.encode(batch, captioned_too=True)
        lines += [
            f"| {run.name} | {g.condition} | {g.queries} | {g.own:.3f} | {g.other:.3f} | {g.percent:.1f} % |"
            for g in gains(system, encoders, item)
        ]
    sys.stdout.write("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
