"""What the layouts are tested with: jobs (what is trained), layouts (over which ranks), and which meet.

Every run of a job has to give the numbers of that job on one process: the same samples in the same order, the
same draws, and per step the same loss and gradient norm, and the same weights in the end.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iomm.config import Config
from tests.small_run import small_config

STEPS, SAVE_EVERY = 6, 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, whatever the layout."""

    settings: dict[str, Any] = field(default_factory=dict)  # by dotted name with "__" for "."
    tolerance: float = 1e-9  # of any number, relative (of a weight: to the largest of its tensor)
    shards: str = "train.tar"


_FP64 = {"train__precision": "fp64", "parallel__distributed_optimizer": False}
_Z_IMAGE = {
    "generator__family": "z_image",
    "generator__hidden_size": 48,
    "generator__rope_axes": [4, 10, 10],
    "generator__double_blocks": 0,
    "generator__single_blocks": 4,
    "generator__refiner_blocks": 1,
    "generator__rope_theta": 256.0,
}
# Adam divides by the root of the second moment: with its usual eps it makes whole steps of gradients that are
# fp32 rounding, and no two layouts round alike.
_FP32 = {"data__mix_ratio": 0.5, "optimizer__eps": 1e-6}
JOBS = {
    "images": Job(settings=_FP64),
    "mixed": Job(settings=_FP64 | {"data__mix_ratio": 0.5, "condition__mask_mode": "hide"}),
    # The generator attends to every position of the MLLM: their number differs between micro-batches.
    "long": Job(
        settings=_FP64
        | {"data__mix_ratio": 0.5, "condition__mask_mode": "drop", "condition__condition_tokens": "all"}
    ),
    # Images change their shape from step to step, and their size in mid-run.
    "buckets": Job(
        settings=_FP64
        | {
            "data__mix_ratio": 0.5,
            "data__buckets": True,
            "data__crop": "random",
            "data__flip": True,
            "data__image_px": 64,
            "data__progression": [[0, 32], [3, 64]],
        },
        shards="shapes.tar",
    ),
    "z_image": Job(settings=_FP64 | _Z_IMAGE | {"data__mix_ratio": 0.5}),
    "fp32": Job(settings=_FP32 | {"condition__mask_mode": "hide"}, tolerance=1e-4),
    "muon": Job(
        settings=_FP32 | {"optimizer__kind": "muon", "parallel__distributed_optimizer": False},
        tolerance=1e-4,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a job is laid over ranks."""

    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)


def _layout(ranks: int, **parallel: Any) -> Layout:
    return Layout(ranks=ranks, settings={f"parallel__{name}": value for name, value in parallel.items()})


_SP = {"tp": 2, "sequence_parallel": True}
_INTERLEAVED = {"pp": 2, "virtual_stages": 2}
LAYOUTS = {
    "1": _layout(1),
    "dp2": _layout(2),
    "tp2": _layout(2, tp=2),
    "tp2 sp": _layout(2, **_SP),
    "tp2 shared": _layout(2, tp=2, encoders="shared"),
    "pp2": _layout(2, pp=2),
    "pp2 vp2": _layout(2, **_INTERLEAVED),
    "pp2 shared": _layout(2, pp=2, encoders="shared"),
    "tp2 pp2": _layout(4, tp=2, pp=2),
    "tp2 dp2": _layout(4, tp=2),
    "pp2 dp2": _layout(4, pp=2),
    "tp2 sp pp2": _layout(4, pp=2, **_SP),
    "tp2 sp pp2 vp2 shared": _layout(4, encoders="shared", **_SP, **_INTERLEAVED),
    "pp2 vp2 dp2": _layout(4, **_INTERLEAVED),
    "pp2 dp2 shared": _layout(4, pp=2, encoders="shared"),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: a job in a layout, from its start or from the middle of another run."""

    job: str
    layout: str
    start: "Run | None" = None  # from this run's checkpoint of step SAVE_EVERY
    settings: tuple[tuple[str, Any], ...] = ()  # that must not change the numbers

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout].ranks

    @property
    def name(self) -> str:
        parts = [self.job, self.layout, *(f"{key.split('__')[-1]} {value}" for key, value in self.settings)]
        return ", ".join(parts) + (f" (from {self.start.layout})" if self.start else "")

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name)

    def config(self, world: Path, out: Path) -> Config:
        settings = {
            "data__heldout": [],
            "data__images": [str(world / JOBS[self.job].shards)],
            "data__pairs": [str(world / JOBS[self.job].shards)],
            "generator__double_blocks": 3,
            "generator__single_blocks": 2,
            "train__steps": STEPS,
            "train__save_every_steps": SAVE_EVERY,
            "train__micro_batch_images": 2,
            "parallel__backend": "local",
        }
        settings |= JOBS[self.job].settings | LAYOUTS[self.layout].settings | dict(self.settings)
        return small_config(world, out, self.folder, **settings)


def _runs(job: str, *layouts: str) -> list[Run]:
    return [Run(job=job, layout=layout) for layout in layouts]


ALONE = {job: Run(job=job, layout="1") for job in JOBS}
FROM_SCRATCH = [
    *_runs("images", "dp2", "tp2", "tp2 sp", "pp2", "pp2 vp2", "tp2 pp2", "tp2 dp2", "pp2 dp2"),
    *_runs("mixed", *(layout for layout in LAYOUTS if layout != "1")),
    *_runs("fp32", "dp2", "tp2 sp", "pp2 vp2", "tp2 dp2", "pp2 dp2"),
    *_runs("long", "tp2 sp", "pp2", "pp2 shared", "tp2 sp pp2 vp2 shared"),
    *_runs("buckets", "dp2", "tp2", "pp2", "pp2 shared", "pp2 vp2 dp2"),
    *_runs("z_image", "tp2 sp", "pp2"),
    *_runs("muon", "tp2", "dp2", "pp2"),
]
# Settings that change the memory or the order of the work, and no number.
VARIATIONS = [
    Run(job="mixed", layout="1", settings=(("parallel__recompute", "full"),)),
    Run(job="mixed", layout="1", settings=(("parallel__recompute", "selective"),)),
    Run(job="mixed", layout="1", settings=(("train__micro_batch_images", 8),)),
    Run(job="mixed", layout="tp2 sp", settings=(("parallel__recompute", "full"),)),
    Run(job="mixed", layout="pp2", settings=(("train__micro_batch_images", 8),)),
    Run(job="mixed", layout="pp2", settings=(("train__micro_batch_images", 1),)),
    Run(job="mixed", layout="pp2 vp2", settings=(("parallel__recompute", "selective"),)),
    Run(job="mixed", layout="pp2 vp2", settings=(("train__micro_batch_images", 1),)),
    Run(job="fp32", layout="dp2", settings=(("train__async_save", True),)),
]


def _ring(job: str, *layouts: str) -> list[Run]:
    """Saved in each layout, loaded in the next; the last one's in the first."""
    starts = {layout: Run(job=job, layout=layout) for layout in layouts}
    pairs = zip(layouts, (*layouts[1:], layouts[0]), strict=True)
    return [Run(job=job, layout=to, start=starts[origin]) for origin, to in pairs]


MOVED = [
    *_ring(
        "mixed",
        *("1", "pp2", "tp2 dp2", "pp2 vp2", "tp2 sp pp2", "dp2", "pp2 dp2 shared", "tp2 shared"),
        *("pp2 dp2", "tp2", "tp2 sp pp2 vp2 shared", "pp2 shared", "tp2 pp2", "tp2 sp", "pp2 vp2 dp2"),
    ),
    *_ring("fp32", "1", "dp2", "tp2 dp2", "pp2 vp2", "pp2 dp2", "tp2 sp"),
    *_ring("z_image", "1", "tp2 sp", "pp2"),
    *_ring("buckets", "dp2", "pp2 shared"),
    *_ring("muon", "1", "tp2", "dp2", "pp2"),
]
# Saved and loaded in the same layout: the numbers are the same to the last bit.
RESUMED = [
    dataclasses.replace(run, start=run)
    for run in (
        *_runs("mixed", "1", "tp2 sp", "pp2 vp2", "tp2 sp pp2 vp2 shared"),
        *_runs("fp32", "1", "dp2", "pp2 dp2", "tp2 dp2"),
        *_runs("muon", "tp2"),
    )
]
# Dies while its checkpoint of step KILLED_AT is written beside the training.
KILLED_EVERY, KILLED_AT = 2, 4
KILLED = Run(
    job="mixed",
    layout="pp2",
    settings=(("train__async_save", True), ("train__save_every_steps", KILLED_EVERY)),
)
EVERY = list(dict.fromkeys([*ALONE.values(), *FROM_SCRATCH, *VARIATIONS, *MOVED, *RESUMED]))


def launches(runs: list[Run]) -> list[tuple[int, list[Run]]]:
    """In which order to do runs: (ranks, runs of one launch), each behind the runs it starts from."""
    out: list[tuple[int, list[Run]]] = []
    done: set[Run] = set()
    waiting = list(dict.fromkeys(runs))
    while waiting:
        for ranks in (1, 2, 4):
            now: list[Run] = []
            for run in waiting:
                if run.ranks == ranks and (run.start is None or run.start in done):
                    now.append(run)
                    done.add(run)
            waiting = [run for run in waiting if run not in done]
            if now:
                out.append((ranks, now))
    return out
