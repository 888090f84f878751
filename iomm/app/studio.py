"""What the page does with a checkpoint, without the page.

Every call that makes a picture is a generator of `Preview`s: estimates of it on its way, the picture itself
last. A hidden mask is text, one character a patch token, row by row: "1" hidden, "0" kept.

B = 1 picture, N patch tokens.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from iomm.conditioning.mask import keep_tokens
from iomm.data.decode import decode_image
from iomm.encoders import Encoders
from iomm.flow.sampler import Method
from iomm.sampling import Task, editing, painting, reconstruction, watch
from iomm.system import System

SHOWN_PX = 512  # smaller pictures are enlarged to it
PREVIEWS = 8  # of a trajectory, about


@dataclass(frozen=True)
class Preview:
    """A picture on its way."""

    number: int  # of the picture: all that were begun are counted
    step: int
    steps: int
    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a picture is generated."""

    seed: int
    steps: int
    method: Method = "euler"


class Studio:
    """One opened checkpoint: a whole system in evaluation mode and its encoders."""

    def __init__(self, system: System, encoders: Encoders) -> None:
        self.system, self.encoders = system, encoders
        self.image_px = system.config.data.image_px
        self.side_tokens = isqrt(encoders.mllm.image_tokens)
        self._numbers = itertools.count(1)
        assert self.side_tokens**2 == encoders.mllm.image_tokens, "the MLLM sees a square"

    def paint(self, prompt: str, guidance: float, sampling: Sampling) -> Iterator[Preview]:
        """A picture of a prompt.

        Raises:
            ValueError: a prompt without tokens, or with too many.
        """
        task = painting(self.system, self.encoders, [prompt], seed=sampling.seed, guidance=guidance)
        return self._watch(task, sampling)

    def reconstruct(self, image: Path, hidden: str, guidance: float, sampling: Sampling) -> Iterator[Preview]:
        """A picture of what an image's kept patch tokens say.

        Raises:
            ValueError: no image file, or a mask that does not fit the image's patch tokens.
        """
        image_1CHW, keep_1N = self.open(image), self._keep(hidden)
        task = reconstruction(
            self.system, self.encoders, image_1CHW, keep_1N, seed=sampling.seed, guidance=guidance
        )
        return self._watch(task, sampling)

    def edit(
        self,
        image: Path,
        instruction: str,
        hidden: str,
        image_guidance: float,
        text_guidance: float,
        sampling: Sampling,
    ) -> Iterator[Preview]:
        """An image as an instruction wants it.

        Raises:
            ValueError: as `reconstruct`, and an instruction without tokens, or with too many.
        """
        task = editing(
            self.system,
            self.encoders,
            self.open(image),
            [instruction],
            self._keep(hidden),
            seed=sampling.seed,
            image_guidance=image_guidance,
            text_guidance=text_guidance,
        )
        return self._watch(task, sampling)

    def open(self, image: Path) -> Tensor:
        """The image as training would see it: uint8 (1, 3, H, W), its centre square.

        Raises:
            ValueError: not a JPEG, PNG or WebP file, damaged, or too large.
        """
        return decode_image(image.read_bytes(), self.image_px)[None]

    def draw_mask(self, mask_ratio: float, seed: int) -> str:
        """A hidden mask as training draws them."""
        keep_1N = keep_tokens(seed, torch.tensor([0]), self.side_tokens**2, mask_ratio)
        return "".join("0" if keep else "1" for keep in keep_1N[0].tolist())

    def _keep(self, hidden: str) -> Tensor:
        tokens = self.side_tokens**2
        if len(hidden) != tokens or set(hidden) - {"0", "1"}:
            raise ValueError(
                f"the mask {hidden[:40]!r} of {len(hidden)} characters does not fit: an image has {tokens} "
                "patch tokens here, each 0 (kept) or 1 (hidden). Draw the mask again."
            )
        return torch.tensor([[character == "0" for character in hidden]])

    def _watch(self, task: Task, sampling: Sampling) -> Iterator[Preview]:
        number, every = next(self._numbers), max(1, sampling.steps // PREVIEWS)
        path = watch(
            self.system, self.encoders, task, steps=sampling.steps, every=every, method=sampling.method
        )
        for step, pictures_1CHW in path:
            yield Preview(number, step, sampling.steps, shown(pictures_1CHW))


def shown(picture_1CHW: Tensor) -> Image.Image:
    """A uint8 RGB picture as the page shows it."""
    image = Image.fromarray(picture_1CHW[0].permute(1, 2, 0).cpu().numpy())
    if max(image.size) >= SHOWN_PX:
        return image
    scale = SHOWN_PX // max(image.size)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
