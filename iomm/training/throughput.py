"""Throughput of the whole system: images/s, and TFLOP/s of generator, MLLM, ViT and autoencoder apart.

The generator is counted by formula; the others by counting the operators of one forward pass. Backward costs
twice the forward where weights are trained, once where only the input's gradient passes through (the MLLM's
query rows).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from iomm.config import Config
from iomm.encoders import Encoders
from iomm.model.flops import generator_forward_flops
from iomm.system import System, condition_tokens, count_condition_flops


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step for one image, forward and backward."""

    generator: float
    mllm: float  # adapter, prefix, query rows and connector
    vit: float
    vae: float

    @classmethod
    def mean(cls, steps: "Sequence[StepFlops]") -> "StepFlops":
        """Part by part."""
        return cls(
            *(sum(parts) / len(steps) for parts in zip(*(vars(s).values() for s in steps), strict=True))
        )


class FlopCount:
    """FLOPs of steps whose micro-batches may differ in image size; each size is counted once."""

    def __init__(self, config: Config, system: System, encoders: Encoders) -> None:
        self._of = config, system, encoders
        self._by_size: dict[tuple[int, int], StepFlops] = {}

    def __call__(self, sizes_px: Sequence[tuple[int, int]]) -> StepFlops:
        """FLOPs of one image, the mean over a step's micro-batches of these (height, width)."""
        for size in sizes_px:
            if size not in self._by_size:
                self._by_size[size] = count_step_flops(*self._of, size)
        return StepFlops.mean([self._by_size[size] for size in sizes_px])


@torch.no_grad()
def count_step_flops(
    config: Config, system: System, encoders: Encoders, size_px: tuple[int, int]
) -> StepFlops:
    """Counts on one blank image sample of this (height, width). Encoders whose outputs are cached count
    nothing."""
    device, cached = encoders.codec.device, encoders.caches
    image = torch.zeros(1, 3, *size_px, dtype=torch.uint8, device=device)
    rows, columns = encoders.codec.grid(*size_px)
    counted: dict[str, int] = {}

    def count(name: str, call: Callable[[], Any]) -> None:
        with FlopCounterMode(display=False) as counter:
            call()
        counted[name] = counter.get_total_flops()

    count("vae", lambda: encoders.codec.encode(image))
    count("vit", lambda: encoders.mllm.vision(image))
    assert system.conditioner is not None
    condition = count_condition_flops(system.conditioner, encoders)
    tokens = condition_tokens(config, encoders.shapes)
    return StepFlops(
        generator=3 * generator_forward_flops(config.generator, rows * columns, tokens),
        mllm=condition.prefix + condition.trained,
        vit=0 if "vit" in cached else counted["vit"],
        vae=0 if "vae" in cached else counted["vae"],
    )


class Stopwatch:
    """Steps and seconds since the last reading, evaluation and saving left out by `pause`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._steps = time.perf_counter(), 0
        self._flops: list[StepFlops] = []

    def step(self, flops: StepFlops | None) -> None:
        """A step is done; `flops` of one of its images, where they are counted."""
        self._steps += 1
        if flops is not None:
            self._flops.append(flops)

    def read(self, images_per_step: int) -> dict[str, object]:
        """images/s, ms a step, and TFLOP/s by part (none without FLOPs); then restarts."""
        seconds, steps = time.perf_counter() - self._start, max(1, self._steps)
        rate = images_per_step * steps / seconds
        parts = vars(StepFlops.mean(self._flops)) if self._flops else {}
        self.restart()
        return {
            "images_per_s": round(rate, 2),
            "step_ms": round(1000 * seconds / steps, 2),
            "tflops": {name: rate * per_image / 1e12 for name, per_image in parts.items()},
        }

    def pause(self) -> "_Pause":
        return _Pause(self)


class _Pause:
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.watch._start += time.perf_counter() - self.began
