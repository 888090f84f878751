"""A checkpoint as a benchmark's painter: prompts to pictures, or images and instructions to pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iomm.conditioning.mask import keep_tokens
from iomm.data.decode import decode_image
from iomm.encoders import Encoders
from iomm.evaluation.benches.generate import Paint
from iomm.evaluation.benches.layout import Bench, BenchError, Item, named
from iomm.flow.sampler import Method
from iomm.sampling import editing, finish, paint
from iomm.system import System


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sampled. A guidance scale of g means v_null + g (v - v_null): 1 is no guidance."""

    seed: int = 0
    steps: int = 25
    method: Method = "euler"
    guidance: float = 3.0
    image_guidance: float = 1.5  # of edits
    mask_ratio: float = 0.5  # of edits: share of the image's patch tokens that is masked

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio <= 1:
            raise BenchError(f"--mask-ratio {self.mask_ratio} must lie in [0, 1].")


def painter(bench: Bench, system: System, encoders: Encoders, how: Sampling) -> Paint:
    """Paints each prompt as often as the benchmark asks."""

    def run(items: Sequence[Item], first: int) -> Tensor:
        texts = [item.text for item in items for _ in range(bench.images_per_prompt)]
        return paint(
            system,
            encoders,
            texts,
            seed=how.seed,
            steps=how.steps,
            guidance=how.guidance,
            method=how.method,
            first=first,
        )

    return run


def editor(system: System, encoders: Encoders, how: Sampling, originals: Path, side_px: int) -> Paint:
    """Edits each item's image by its instruction.

    Args:
        originals: folder of the images to edit.
        side_px: that they are shown at.
    """

    def run(items: Sequence[Item], first: int) -> Tensor:
        images = [decode_image((originals / str(item.source)).read_bytes(), side_px) for item in items]
        numbers = torch.arange(first, first + len(items))
        task = editing(
            system,
            encoders,
            torch.stack(images),
            [item.text for item in items],
            keep_tokens(how.seed, numbers, encoders.mllm.image_tokens, how.mask_ratio),
            seed=how.seed,
            image_guidance=how.image_guidance,
            text_guidance=how.guidance,
            first=first,
        )
        return finish(system, encoders, task, steps=how.steps, method=how.method)

    return run


def check_items(items: Sequence[Item], encoders: Encoders, originals: Path | None) -> None:
    """Refuse at the start what would fail in the middle.

    Raises:
        BenchError: prompts that the MLLM cannot read (too long), or originals that are not there.
    """
    for item in items:
        try:
            encoders.mllm.tokenize(item.text)
        except ValueError as error:
            raise BenchError(f"prompt {item.key}: {error}") from error
    lost = (
        []
        if originals is None
        else [str(i.source) for i in items if not (originals / str(i.source)).is_file()]
    )
    if lost:
        raise BenchError(
            f"{originals} lacks {len(lost)} images to edit: {named(lost)}. Give ImgEdit's originals."
        )
