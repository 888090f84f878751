"""What each design choice brings, from the method as the paper prints it to all of ours together.

The paper reports 1,000 H800 GPU-hours for IOMM-B's stage 1, which is 30.6 images/s on each GPU, and nothing
of how it was implemented. Each level is given as predicted, and scaled so that the first one equals 30.6.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from iomm.config import Config, Fp8Config
from iomm.plan.calibration import Efficiency
from iomm.plan.hardware import Cluster
from iomm.plan.step import Estimate, estimate
from iomm.plan.workload import Workload, varied

PAPER_IMAGES_PER_S = 30.6  # of one H800; arXiv 2603.16139: 11 M x 10 images in about 1,000 GPU-hours
TARGET_IMAGES_PER_S = 61.0


@dataclass(frozen=True)
class Lever:
    """One choice, on top of those before it."""

    name: str
    apply: Callable[[Workload], Workload]


def _fp8(work: Workload) -> Workload:
    return replace(work, config=replace(work.config, fp8=Fp8Config(recipe="current")))


LEVERS = (
    Lever("prefix split", lambda w: varied(w, condition__prefix_split=True)),
    Lever("mask mode drop", lambda w: varied(w, condition__mask_mode="drop")),
    Lever("cached VAE moments", lambda w: varied(w, cached=w.cached | {"vae"})),
    Lever("fused kernels", lambda w: varied(w, fused=True)),
    Lever("FP8 (current scaling)", _fp8),
    Lever("cached ViT features", lambda w: varied(w, cached=w.cached | {"vit"})),
)


@dataclass(frozen=True, kw_only=True)
class Level:
    """The run with all levers up to this one."""

    name: str
    made: Estimate
    low: float  # images/s of one GPU, at the slowest calibration run's factor
    high: float
    alone: float  # how many times faster this lever is by itself than the first level


def naive(work: Workload) -> Workload:
    """The method without our choices: one pass over prefix and queries, every image encoded at every step,
    masked tokens kept as zeros, PyTorch's own operators, bf16. The optimizer is sharded: whole, it would not
    fit."""
    config: Config = replace(work.config, fp8=Fp8Config())
    work = replace(work, config=config, fused=False, cached=frozenset())
    settings = {"condition__prefix_split": False, "condition__mask_mode": "zero"}
    return varied(work, **settings, parallel__distributed_optimizer=True)


def ladder(
    work: Workload, cluster: Cluster, fitted: Efficiency, bounds: tuple[Efficiency, Efficiency]
) -> list[Level]:
    """Every level, in the layout of `work`.

    Raises:
        ValueError: a layout that does not divide.
    """
    start = naive(work)
    first = estimate(start, cluster, fitted)
    levels, now = [], start
    for lever in (Lever("the method as printed", lambda w: w), *LEVERS):
        now = lever.apply(now)
        levels.append(
            Level(
                name=lever.name,
                made=estimate(now, cluster, fitted),
                low=estimate(now, cluster, bounds[0]).images_per_s,
                high=estimate(now, cluster, bounds[1]).images_per_s,
                alone=first.seconds / estimate(lever.apply(start), cluster, fitted).seconds,
            )
        )
    return levels


def needed_factor(made: Estimate, fitted: Efficiency, images_per_s: float) -> float:
    """The system factor at which the run reaches a rate; what the factor does not touch is kept."""
    waited = made.parts["communication waited for"]
    wanted = made.work.config.train.global_batch_images / images_per_s / made.cluster.gpus
    return fitted.system * (made.seconds - waited) / (wanted - waited)
