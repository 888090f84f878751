"""What the tiny MLLM learns from: augmented emoji and drawn shape scenes, about half and half.

Every sample is a function of (seed, sample index) alone. Emoji come from the train shards only. Their
pictures stand on white, so the white that touches the border is taken for background and may be repainted,
which is then said ("red apple on a blue background"); two of them may share a picture ("red apple left of
grinning face").

    pixels_BCHW   images scaled to (value / 255 - 0.5) / 0.5, that is -1 to 1
    caption_BS    token ids of the caption, `</s>` and right padding
    length_B      tokens in each caption, `</s>` not counted
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from transformers import PreTrainedTokenizerBase

from examples.tiny.mllm_tokenizer import SPECIAL_IDS
from examples.tiny.shape_scenes import (
    COLOURS,
    RELATIONS,
    WHITE,
    Relation,
    background_phrase,
    draw_scene,
    sample_scene,
)
from iomm.evaluation.shapes.prompts import FRAMES

SIDE_PX = 64
# Labels whose picture must not be mirrored: sides, writing, clock hands, flags.
SIDED = re.compile(r"left|right|flag|button|clock|arrow|keycap|symbol|sign|[A-Z]")


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One picture of the shards: RGB on white, with `ground` (mode L, 255 = background) of the same side."""

    key: str
    label: str
    image: Image.Image
    ground: Image.Image


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """A picture of `SIDE_PX` pixels a side and what is in it."""

    image: Image.Image
    caption: str


@dataclass(frozen=True, kw_only=True)
class CaptionBatch:
    """Tensors of one batch; the legend is at the top of the file."""

    pixels_BCHW: torch.Tensor
    caption_BS: torch.Tensor
    length_B: torch.Tensor


def background_mask(image: Image.Image) -> Image.Image:
    """The near-white region that touches the border, softly edged: mode L, 255 where it is background."""
    near_white = np.asarray(image).min(axis=2) > 244
    framed = np.pad(near_white, 1, constant_values=True)
    canvas = Image.fromarray(np.where(framed, 128, 0).astype(np.uint8)).copy()  # a copy can be drawn on
    ImageDraw.floodfill(canvas, (0, 0), 255)
    ground = np.asarray(canvas)[1:-1, 1:-1] == 255
    return Image.fromarray((ground * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def load_emoji(shards: Sequence[Path]) -> list[Emoji]:
    """Reads WebDataset shards (`KEY.webp`, `KEY.json` with a `label`) in key order.

    Raises ValueError when there is no shard or a sample lacks its label.
    """
    if not shards:
        raise ValueError(
            "no emoji shards were given. Build them with `python -m examples.data.build_fluent_emoji`."
        )
    members: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    members[member.name] = file.read()
    emoji = []
    for name in sorted(n for n in members if n.endswith(".webp")):
        key = name.removesuffix(".webp")
        if f"{key}.json" not in members:
            raise ValueError(
                f"sample {key} has an image but no {key}.json with its label. Rebuild the shards."
            )
        image = Image.open(io.BytesIO(members[name])).convert("RGB")
        if image.size != (SIDE_PX, SIDE_PX):
            image = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        label = str(json.loads(members[f"{key}.json"])["label"])
        emoji.append(Emoji(key=key, label=label, image=image, ground=background_mask(image)))
    return emoji


def is_set_aside(label: str) -> bool:
    """Whether a train emoji is kept out of training to choose the best step by: one label in twenty."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") % 20 == 0


def _varied(emoji: Emoji, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Picture and background mask, seven times in ten turned by at most 12 degrees and tinted by a tenth."""
    if rng.uniform() < 0.3:
        return emoji.image, emoji.ground
    degrees, gains = float(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1, size=3)
    table = [min(255, round(value * float(gain))) for gain in gains for value in range(256)]
    image = emoji.image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=WHITE).point(table)
    return image, emoji.ground.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=255)


def _paste(
    canvas: Image.Image,
    picture: tuple[Image.Image, Image.Image],
    side_px: int,
    corner_px: tuple[int, int],
    mirror: bool,
) -> None:
    image, ground = picture
    if mirror:
        image, ground = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (image, ground))
    if side_px != SIDE_PX:
        image, ground = (i.resize((side_px, side_px), Image.Resampling.BICUBIC) for i in (image, ground))
    canvas.paste(image, corner_px, ground.point(lambda v: 255 - v))


def _mirrored(rng: np.random.Generator, emoji: Emoji) -> bool:
    return bool(rng.uniform() < 0.5) and SIDED.search(emoji.label) is None


def single_emoji(emoji: Emoji, rng: np.random.Generator) -> CaptionedImage:
    """One emoji: perhaps mirrored, turned, tinted, scaled, shifted; three in ten on a named background."""
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))] if rng.uniform() < 0.3 else None
    canvas = Image.new("RGB", (SIDE_PX, SIDE_PX), WHITE if colour is None else COLOURS[colour])
    side_px = SIDE_PX if rng.uniform() < 0.3 else int(rng.integers(44, SIDE_PX + 7))
    room_px = abs(SIDE_PX - side_px) // 2 + 3
    x, y = (int(v) + (SIDE_PX - side_px) // 2 for v in rng.integers(-room_px, room_px + 1, size=2))
    _paste(canvas, _varied(emoji, rng), side_px, (x, y), _mirrored(rng, emoji))
    return CaptionedImage(image=canvas, caption=emoji.label + background_phrase(colour))


def two_emoji(first: Emoji, second: Emoji, rng: np.random.Generator) -> CaptionedImage:
    """Two half-size emoji side by side or one over the other, with the relation in the caption."""
    relation: Relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    canvas = Image.new("RGB", (SIDE_PX, SIDE_PX), WHITE)
    half = SIDE_PX // 2
    dx, dy = RELATIONS[relation]
    for emoji, sign in ((first, 1), (second, -1)):
        side_px = int(rng.integers(half - 4, half + 1))
        jitter_x, jitter_y = (int(v) for v in rng.integers(-2, 3, size=2))
        centre = (half + sign * dx * half // 2 + jitter_x, half + sign * dy * half // 2 + jitter_y)
        _paste(
            canvas,
            (emoji.image, emoji.ground),
            side_px,
            (centre[0] - side_px // 2, centre[1] - side_px // 2),
            _mirrored(rng, emoji),
        )
    return CaptionedImage(image=canvas, caption=f"{first.label} {relation} {second.label}")


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 7]).permutation(count)


def training_sample(emoji: Sequence[Emoji], seed: int, index: int) -> CaptionedImage:
    """Sample `index` of the training stream: even ones are emoji, reshuffled each epoch, odd ones scenes."""
    rng = np.random.default_rng([seed, index])
    if index % 2:
        scene = sample_scene(rng)
        return CaptionedImage(image=draw_scene(scene, SIDE_PX), caption=scene.caption)
    epoch, place = divmod(index // 2, len(emoji))
    first = emoji[int(_epoch_order(len(emoji), seed, epoch)[place])]
    if rng.uniform() < 0.85:
        return single_emoji(first, rng)
    return two_emoji(first, emoji[int(rng.integers(len(emoji)))], rng)


def training_batch(emoji: Sequence[Emoji], seed: int, step: int, count: int) -> list[CaptionedImage]:
    """The samples of a step: emoji alone in even steps, scenes alone in odd ones.

    One kind a batch, so that the alignment loss holds like against like.
    """
    first = step // 2 * count
    return [training_sample(emoji, seed, 2 * (first + i) + step % 2) for i in range(count)]


def framed(
    samples: Sequence[CaptionedImage], fraction: float, rng: np.random.Generator
) -> list[CaptionedImage]:
    """The samples, a random fraction of them captioned in the words around the shapes world's prompts."""

    def reword(caption: str) -> str:
        frame = FRAMES[int(rng.integers(len(FRAMES)))]
        return frame.format(caption) if rng.uniform() < fraction else caption

    return [replace(sample, caption=reword(sample.caption)) for sample in samples]


def heldout_scenes(count: int, seed: int) -> list[CaptionedImage]:
    """Shape scenes whose captions training never draws."""
    scenes = [
        sample_scene(np.random.default_rng([seed, 1_000_000_007, i]), heldout=True) for i in range(count)
    ]
    return [CaptionedImage(image=draw_scene(s, SIDE_PX), caption=s.caption) for s in scenes]


def training_texts(emoji: Sequence[Emoji], prompts: Sequence[str], seed: int) -> list[str]:
    """The texts the tokenizer is trained on: train labels, captions of drawn samples, the prompts."""
    drawn = [training_sample(emoji, seed, index).caption for index in range(1, 3001, 2)]
    repeats = [prompt for prompt in prompts for _ in range(400)]
    phrases = [background_phrase(c).strip() for c in COLOURS for _ in range(5)]
    return [e.label for e in emoji for _ in range(2)] + drawn + repeats + phrases


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images as (B, 3, H, W) fp32 in -1 to 1, the normalisation that `preprocessor_config.json` states."""
    array_BHWC = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array_BHWC.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1.0


def collate(samples: Sequence[CaptionedImage], tokenizer: PreTrainedTokenizerBase) -> CaptionBatch:
    """Stacks samples into the tensors of one batch."""
    ids = [tokenizer.encode(s.caption, add_special_tokens=False) for s in samples]
    longest = max(len(i) for i in ids) + 1
    caption_BS = torch.full((len(ids), longest), SPECIAL_IDS["<pad>"], dtype=torch.long)
    for row, tokens in enumerate(ids):
        caption_BS[row, : len(tokens) + 1] = torch.tensor([*tokens, SPECIAL_IDS["</s>"]])
    return CaptionBatch(
        pixels_BCHW=pixels([s.image for s in samples]),
        caption_BS=caption_BS,
        length_B=torch.tensor([len(i) for i in ids]),
    )
