"""What is watched while a run trains: held-out losses, sample grids, the copying alarm."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iomm.config import Config, DataConfig
from iomm.data.errors import BadSample
from iomm.data.loader import Batch, Loader
from iomm.data.shards import ShardSet
from iomm.encoders import Encoded, Encoders
from iomm.evaluation.grid import image_grid, save_png
from iomm.evaluation.heldout import CONDITIONS, EVAL_SEED, copying, heldout_loss
from iomm.evaluation.reconstruction import leave_reconstruction, measure
from iomm.parallel.mesh import Mesh
from iomm.sampling import paint
from iomm.system import System
from iomm.training.run import Run

GRID_IMAGES = 12


def spaced(n: int, total: int) -> list[int]:
    """At most n positions spread evenly over range(total)."""
    return [i * total // min(n, total) for i in range(min(n, total))]


def example_prompts(data: DataConfig, n: int) -> tuple[list[str], list[str]]:
    """Up to n captions of training pairs and up to n held-out captions, spread over the shards; unreadable
    ones are left out, as in training."""
    found: list[list[str]] = []
    for patterns in (data.pairs, data.heldout):
        captions: list[str] = []
        if patterns:
            shards = ShardSet.open(patterns, captioned_only=True)
            for i in spaced(n, len(shards)):
                with contextlib.suppress(BadSample):  # reported where a step or an evaluation meets it
                    caption = shards.caption(i)
                    captions += [] if caption is None else [caption]
        found.append(captions)
    return found[0], found[1]


@dataclass(frozen=True)
class Watch:
    """Held-out samples, encoded once, and the prompts of the grids."""

    config: Config
    encoders: Encoders
    mesh: Mesh
    items: list[Encoded]
    samples: int
    grid_batch: Batch
    prompts: list[str]

    @classmethod
    def prepare(cls, config: Config, encoders: Encoders, loader: Loader, mesh: Mesh) -> "Watch | None":
        """None if the run has no held-out shards. Samples are dealt to the data-parallel ranks."""
        if not config.data.heldout:
            return None
        samples, size = config.train.eval_images, config.train.micro_batch_images
        batch = loader.heldout(samples)
        mine = list(range(mesh.dp_rank, samples, mesh.dp_size))
        parts = [batch.take(mine[i : i + size]) for i in range(0, len(mine), size)]
        items = [encoders.encode(part, captioned_too=True) for part in parts]
        seen, heldout = example_prompts(config.data, GRID_IMAGES)
        grid_batch = batch.take(spaced(GRID_IMAGES, samples))
        return cls(config, encoders, mesh, items, samples, grid_batch, seen + heldout)

    def evaluate(self, system: System, run: Run, step: int, *, last: bool) -> str:
        """Log held-out losses and the copying check; returns a line for the screen.

        Args:
            last: of the run, which also leaves the reconstruction at other mask ratios than the trained one.
        """
        loss = heldout_loss(system, self.encoders, self.items, self.mesh, self.samples)
        check, masked, null = copying(
            system,
            self.encoders,
            self.grid_batch.image_BCHW,
            self.grid_batch.index_B,
            self.config.train.sample_steps,
        )
        record: dict[str, Any] = {
            "velocity_loss": loss.mean,
            "by_timestep": loss.by_timestep,
            "timesteps": loss.timesteps,
            "copying": {**vars(check), "alarm": check.reason is not None, "reason": check.reason},
        }
        run.log("eval", step, **record)
        if run.writes:
            self._save_reconstructions(run, step, masked, null)
        if last:
            self._reconstruct(system, run, step)
        line = "held-out velocity loss  " + "  ".join(f"{name} {loss.mean[name]:.4f}" for name in CONDITIONS)
        return line if check.reason is None else f"{line}\nCOPYING ALARM: {check.reason}"

    def _save_reconstructions(self, run: Run, step: int, masked: Tensor, null: Tensor) -> None:
        n = len(masked)
        pictures = torch.cat((self.grid_batch.image_BCHW, masked.cpu(), null.cpu()))
        captions = [f"image {key}" for key in self.grid_batch.keys]
        captions += [f"from {1 - self.config.condition.mask_ratio:.0%} of its tokens"] * n + [
            "from none of them"
        ] * n
        save_png(
            image_grid(pictures, n, captions, cell_px=96),
            run.dir / f"samples/step_{step:06d}_reconstruction.png",
        )

    def _reconstruct(self, system: System, run: Run, step: int) -> None:
        """Measure reconstruction against the mask ratio. All ranks compute it, rank 0 writes."""
        image_BCHW, index_B = self.grid_batch.image_BCHW, self.grid_batch.index_B
        sampler_steps = self.config.train.sample_steps
        found, pictures = measure(
            system, self.encoders, image_BCHW, index_B, step=step, sampler_steps=sampler_steps
        )
        if run.writes:
            leave_reconstruction(run.dir, found, pictures, image_BCHW)

    def paint(self, system: System, run: Run, step: int) -> None:
        """Save the grid of the example prompts. All ranks compute it (tensor parallelism needs them), rank 0
        writes."""
        train = self.config.train
        pictures = paint(
            system,
            self.encoders,
            self.prompts,
            seed=EVAL_SEED,
            steps=train.sample_steps,
            guidance=train.sample_guidance,
        )
        if run.writes:
            sheet = image_grid(pictures, GRID_IMAGES, self.prompts, cell_px=96)
            save_png(sheet, run.grid_path(step))
