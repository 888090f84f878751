"""`iomm evaluate reconstruction`: what the command line says. Imports nothing heavy."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iomm.config import Config
    from iomm.data.errors import BadSampleReport
    from iomm.encoders import Encoders
    from iomm.system import System

DESCRIPTION = "how much of held-out images comes back at each mask ratio, for the run's report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options. The weights are those that training evaluates: the EMA if the run kept one."""
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder (its newest checkpoint) or one of its checkpoints"
    )
    parser.add_argument("--images", type=int, default=32, help="held-out images (default 32)")
    parser.add_argument("--steps", type=int, default=25, help="sampler steps (default 25)")
    parser.add_argument(
        "--mask-ratio",
        type=float,
        action="append",
        help="share of patch tokens masked; may be repeated (default 0, 0.25, 0.5, 0.75, 0.95, 1)",
    )


def check_ratios(ratios: list[float]) -> None:
    """Raises:
    ValueError: a mask ratio that is no share.
    """
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"--mask-ratio {ratio} must lie in [0, 1].")


def evaluate(
    arguments: argparse.Namespace, run_dir: Path, step: int, opened: "tuple[Config, Encoders, System]"
) -> int:
    """Measure an opened checkpoint of a run on the run's first held-out images and leave it in its folder.

    Raises:
        ValueError: fewer held-out images than were asked for.
    """
    from iomm.data.loader import Loader
    from iomm.evaluation.reconstruction import RATIOS, leave_reconstruction, measure

    def on_bad(report: "BadSampleReport") -> None:
        sys.stderr.write(f"{report}\n")

    config, encoders, system = opened
    batch = Loader(config.data, config.train.seed, on_bad=on_bad).heldout(arguments.images)
    found, pictures = measure(
        system,
        encoders,
        batch.image_BCHW,
        batch.index_B,
        step=step,
        sampler_steps=arguments.steps,
        ratios=sorted(arguments.mask_ratio or RATIOS),
    )
    path = leave_reconstruction(run_dir, found, pictures, batch.image_BCHW)
    for ratio, db in zip(found.ratios, found.psnr_db, strict=True):
        sys.stdout.write(f"mask ratio {ratio:<5g} {db.mean:6.2f} dB  [{db.low:.2f}, {db.high:.2f}]\n")
    sys.stdout.write(f"{path}\n")
    return 0
