"""Which layouts a run could have, which of them are feasible, and how they rank."""

import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from iomm.config import ParallelConfig
from iomm.plan.calibration import Efficiency
from iomm.plan.hardware import GIB, Cluster
from iomm.plan.step import Estimate, estimate
from iomm.plan.workload import Workload

SIZES = (1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
# What a layout says, as it is written on the command line, and the setting behind it.
KEYS = {
    "tp": "tp",
    "sp": "sequence_parallel",
    "pp": "pp",
    "vpp": "virtual_stages",
    "recompute": "recompute",
    "encoders": "encoders",
}
CHOICES = {
    name: typing.get_args(typing.get_type_hints(ParallelConfig)[name]) for name in ("recompute", "encoders")
}
_SAYS_SO = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """All layouts that were looked at."""

    feasible: list[Estimate]  # the fastest first
    too_large: list[Estimate]  # would work, but for their memory; the fastest first
    refused: dict[str, list[str]] = field(default_factory=dict)  # messages, alike but for their numbers


def parse_layout(text: str) -> dict[str, Any]:
    """`tp=2,pp=4,micro=8,recompute=full` -> settings of `ParallelConfig`, and "micro" if it is given.

    Raises:
        ValueError: an unknown key or a value of the wrong kind.
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in (*KEYS, "micro"):
            raise ValueError(f"--layout: unknown key {key!r}. Known: {', '.join((*KEYS, 'micro'))}.")
        if key == "sp" and value in _SAYS_SO:
            found[KEYS[key]] = _SAYS_SO[value]
        elif value in CHOICES.get(key, ()):
            found[key] = value
        elif value.isdigit() and key != "sp" and key not in CHOICES:
            found[KEYS.get(key, key)] = int(value)
        else:
            raise ValueError(
                f"--layout: {part!r} has no usable value. Write for instance tp=2,sp=true,micro=8."
            )
    return found


def with_layout(work: Workload, layout: Mapping[str, Any]) -> Workload:
    """The workload in that layout.

    Raises:
        ValueError: a layout that the settings do not allow.
    """
    settings = dict(layout)
    micro = settings.pop("micro", work.config.train.micro_batch_images)
    parallel = replace(work.config.parallel, **settings)
    train = replace(work.config.train, micro_batch_images=micro)
    return replace(work, config=replace(work.config, parallel=parallel, train=train))


def candidates(work: Workload, cluster: Cluster, fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Layouts worth a look; `fixed` settings stay as they are."""
    config = work.config
    options = {
        "tp": [n for n in SIZES if n <= cluster.node_gpus],
        "sequence_parallel": [False, True],
        "pp": list(SIZES),
        "virtual_stages": [1, 2, 4],
        "recompute": ["none", "selective", "full"],
        "encoders": ["first_stage", "shared"],
        "micro": [n for n in MICRO_BATCHES if n <= config.train.global_batch_images],
    }
    options |= {key: [value] for key, value in fixed.items()}
    for values in itertools.product(*options.values()):
        layout = dict(zip(options, values, strict=True))
        idle = (
            layout["tp"] == 1 and layout["sequence_parallel"],
            layout["pp"] == 1 < layout["virtual_stages"],
        )
        alone = layout["tp"] * layout["pp"] == 1 and layout["encoders"] == "shared"
        if not any((*idle, alone)) and layout["tp"] * layout["pp"] <= cluster.gpus:
            yield layout


def rank(
    work: Workload, cluster: Cluster, efficiency: Efficiency, fixed: Mapping[str, Any] | None = None
) -> Ranked:
    """Every candidate, the fastest first.

    Raises:
        ValueError: not a single layout divides; the message says why.
    """
    feasible, too_large, refused = [], [], {}
    for layout in candidates(work, cluster, fixed or {}):
        try:
            made = estimate(with_layout(work, layout), cluster, efficiency)
        except ValueError as error:
            refused.setdefault(re.sub(r"\d+", "N", str(error)), []).append(str(error))
            continue
        (feasible if made.fits else too_large).append(made)
    if not feasible and not too_large:
        reasons = " ".join(f"{len(found)} layouts: {found[0]}" for found in refused.values())
        raise ValueError(f"no layout of {cluster.gpus} GPUs is possible. {reasons}")

    def order(made: Estimate) -> tuple[float, float]:
        return made.seconds, made.peak_bytes

    return Ranked(
        feasible=sorted(feasible, key=order), too_large=sorted(too_large, key=order), refused=refused
    )


def describe(parallel: ParallelConfig, micro_batch: int) -> str:
    """A layout in a few words: `tp 2 + sp, pp 4 x 2, selective recompute, shared encoders, micro 8`."""
    words = [f"tp {parallel.tp}" + (" + sp" if parallel.sequence_parallel else "")]
    words.append(
        f"pp {parallel.pp}" + (f" x {parallel.virtual_stages}" if parallel.virtual_stages > 1 else "")
    )
    words += [f"{parallel.recompute} recompute"] if parallel.recompute != "none" else []
    words += ["shared encoders"] if parallel.encoders == "shared" else []
    return ", ".join([*words, f"micro {micro_batch}"])


def why_too_large(made: Estimate) -> str:
    """What the fullest stage needs, and the largest items of it."""
    worst = max(made.memory, key=lambda memory: memory.peak)
    largest = sorted(vars(worst).items(), key=lambda pair: -pair[1])[:3]
    have = made.cluster.gpu.memory_bytes - made.cluster.gpu.reserve_bytes
    items = ", ".join(f"{name} {size / GIB:.0f}" for name, size in largest)
    return f"{worst.peak / GIB:.0f} GiB of {have / GIB:.0f} ({items})"
