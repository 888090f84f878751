"""Measures a trained tiny MLLM and writes the figures to the `README.md` of its folder.

    python -m examples.tiny.mllm_report --mllm examples/tiny/mllm     (repository root)

Everything is measured on what the folder holds (fp16 weights, computed in fp32), in the run-time format
[ default aux prompt | 16 patch tokens ] for images and [ caption tokens ] for text. The legend of the shape
suffixes is that of mllm_model.py.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoTokenizer, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from examples.tiny.mllm_data import (
    SIDE_PX,
    CaptionedImage,
    collate,
    heldout_scenes,
    load_emoji,
    pixels,
    training_texts,
)
from examples.tiny.mllm_model import AUX_PROMPTS, NULL_PROMPT, image_prefix, run_language_model, token_losses
from examples.tiny.mllm_readme import README, commands, trained
from examples.tiny.mllm_tokenizer import SPECIAL_IDS
from examples.tiny.shape_scenes import COLOURS, NUMBERS, SHAPES

HERE = Path(__file__).parent
PLACES = ("left", "right", "above", "below", "top", "bottom", "corner")
Change = Callable[[torch.Tensor], torch.Tensor]  # pixels_BCHW -> pixels_BCHW


@dataclass(frozen=True, kw_only=True)
class TinyMllm:
    """A loaded fp32 model and its tokenizer; `align_layer` is where image and text states were aligned."""

    model: InternVLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    align_layer: int

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the default aux prompt."""
        return self.tokenizer.encode(AUX_PROMPTS[0], add_special_tokens=False)


def load_tiny_mllm(folder: Path) -> TinyMllm:
    """Loads the shipped folder, offline. Raises ValueError when it holds no trained model."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds no model.safetensors. "
            f"Train one: python -m examples.tiny.train_mllm --out {folder}"
        )
    model = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layer = json.loads((folder / "training.json").read_text())["align_layer"]
    return TinyMllm(model=model, tokenizer=tokenizer, align_layer=layer)


def own(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Every caption with its own image."""
    return pixels_BCHW


def blank(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Every caption with a white image."""
    return torch.ones_like(pixels_BCHW)


def other(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Every caption with the image of the sample before it."""
    return pixels_BCHW.roll(1, dims=0)


@torch.no_grad()
def caption_loss(
    mllm: TinyMllm, samples: Sequence[CaptionedImage], images: Change = own, masked: bool = False
) -> float:
    """Mean caption loss in nats per token, `</s>` counted, given the images as `images` changes them.

    With `masked` every patch token is zeroed: the language model without an image.
    """
    batch = collate(samples, mllm.tokenizer)
    keep_BP = torch.full((len(samples), 16), not masked)
    prefix_BLD = image_prefix(mllm.model, images(batch.pixels_BCHW), mllm.prompt_ids, keep_BP)
    words_BSD = mllm.model.get_input_embeddings()(batch.caption_BS)[:, :-1]
    states_BLD, _ = run_language_model(
        mllm.model, torch.cat([prefix_BLD, words_BSD], dim=1), mllm.align_layer
    )
    counted_BS = torch.arange(batch.caption_BS.shape[1]) <= batch.length_B[:, None]
    losses_BS = token_losses(
        mllm.model, states_BLD[:, prefix_BLD.shape[1] - 1 :], batch.caption_BS, counted_BS
    )
    return float(losses_BS.sum() / counted_BS.sum())


def unigram_loss(mllm: TinyMllm, training: Sequence[str], samples: Sequence[CaptionedImage]) -> float:
    """Nats per token, `</s>` counted, under the training tokens' frequencies (add-one smoothed)."""
    count_V = torch.ones(len(mllm.tokenizer), dtype=torch.float64)
    for text in training:
        for token in (*mllm.tokenizer.encode(text, add_special_tokens=False), SPECIAL_IDS["</s>"]):
            count_V[token] += 1
    log_V = (count_V / count_V.sum()).log()
    batch = collate(samples, mllm.tokenizer)
    counted_BS = torch.arange(batch.caption_BS.shape[1]) <= batch.length_B[:, None]
    return float(-log_V[batch.caption_BS[counted_BS]].mean())


@torch.no_grad()
def retrieval(mllm: TinyMllm, samples: Sequence[CaptionedImage]) -> dict[str, float]:
    """Recall at 1 and 5, image to caption and back, by the cosine of the aligned layer's last states.

    Captions that occur twice count as right for either image.
    """
    batch = collate(samples, mllm.tokenizer)
    prefix_BLD = image_prefix(mllm.model, batch.pixels_BCHW, mllm.prompt_ids)
    _, image_BLD = run_language_model(mllm.model, prefix_BLD, mllm.align_layer)
    _, text_BSD = run_language_model(
        mllm.model, mllm.model.get_input_embeddings()(batch.caption_BS), mllm.align_layer
    )
    image_BD = functional.normalize(image_BLD[:, -1], dim=-1)
    text_BD = functional.normalize(text_BSD[torch.arange(len(samples)), batch.length_B - 1], dim=-1)
    right_BB = (batch.caption_BS[:, None] == batch.caption_BS[None]).all(dim=-1)
    similarity_BB = image_BD @ text_BD.T
    recalls = {}
    for way, scores_BB in (("image to caption", similarity_BB), ("caption to image", similarity_BB.T)):
        for k in (1, 5):
            best_BK = scores_BB.topk(k, dim=1).indices
            recalls[f"{way} @{k}"] = float(right_BB.gather(1, best_BK).any(dim=1).float().mean())
    return recalls


@torch.no_grad()
def describe(mllm: TinyMllm, images: Sequence[Image.Image], longest: int = 32) -> list[str]:
    """Greedy captions of images of `SIDE_PX` pixels a side, at most `longest` tokens each."""
    embeds_BLD = image_prefix(mllm.model, pixels(images), mllm.prompt_ids)
    past, tokens = None, []
    ended_B = torch.zeros(len(images), dtype=torch.bool)
    while len(tokens) < longest and not bool(ended_B.all()):
        out = mllm.model.model.language_model(inputs_embeds=embeds_BLD, past_key_values=past, use_cache=True)
        past = out.past_key_values
        token_B1 = mllm.model.lm_head(out.last_hidden_state[:, -1:]).argmax(dim=-1)
        tokens.append(token_B1)
        ended_B |= token_B1[:, 0] == SPECIAL_IDS["</s>"]
        embeds_BLD = mllm.model.get_input_embeddings()(token_B1)
    captions = []
    for row in torch.cat(tokens, dim=1).tolist():
        end = row.index(SPECIAL_IDS["</s>"]) if SPECIAL_IDS["</s>"] in row else len(row)
        captions.append(mllm.tokenizer.decode(row[:end], skip_special_tokens=True))
    return captions


def same_words(said: str, meant: str) -> bool:
    """Whether two captions are equal but for case and for which of two kinds joined by `and` comes first."""
    return sorted(said.lower().split(" and ")) == sorted(meant.lower().split(" and "))


def words_right(said: Sequence[str], meant: Sequence[str], kinds: Sequence[str]) -> float:
    """Share of the captions with exactly the words of one kind that they should have, in any order."""

    def found(caption: str) -> list[str]:
        singular = (word.lower() for word in caption.split())
        return sorted(w for word in singular for w in kinds if word in (w, w + "s", w + "es"))

    return sum(found(a) == found(b) for a, b in zip(said, meant, strict=True)) / len(said)


def shards(data: Path, split: str) -> list[Path]:
    """The tar files of a split, in order."""
    return sorted(data.glob(f"{split}-*.tar"))


def emoji_samples(data: Path, split: str) -> list[CaptionedImage]:
    """The untouched pictures of a split with their labels."""
    return [CaptionedImage(image=e.image, caption=e.label) for e in load_emoji(shards(data, split))]


def figures(mllm: TinyMllm, data: Path, scenes: int) -> str:
    """The measured part of the README, as Markdown."""
    train_set, unseen = emoji_samples(data, "train"), emoji_samples(data, "heldout")
    drawn = heldout_scenes(scenes, seed=0)
    texts = training_texts(load_emoji(shards(data, "train")), (*AUX_PROMPTS, NULL_PROMPT), seed=0)
    sets = {
        f"train emoji (first {len(train_set[::8])} of every 8th)": train_set[::8],
        f"held-out emoji ({len(unseen)})": unseen,
        f"held-out shape scenes ({len(drawn)})": drawn,
    }
    lines = [
        "| caption loss, nats per token | its image | another image | white image | all masked | unigram |",
        "|---|---|---|---|---|---|",
    ]
    for name, samples in sets.items():
        values = [
            caption_loss(mllm, samples),
            caption_loss(mllm, samples, other),
            caption_loss(mllm, samples, blank),
            caption_loss(mllm, samples, masked=True),
            unigram_loss(mllm, texts, samples),
        ]
        lines.append(f"| {name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    lines += [
        "",
        "| retrieval (chance @1) | image to caption @1 | @5 | caption to image @1 | @5 |",
        "|---|---|---|---|---|",
    ]
    for name, samples in sets.items():
        recalls = retrieval(mllm, samples)
        lines.append(
            f"| {name} ({1 / len(samples):.1%}) | " + " | ".join(f"{v:.1%}" for v in recalls.values()) + " |"
        )
    lines += ["", "| greedy caption equal to the true one | |", "|---|---|"]
    for name, samples in sets.items():
        said = describe(mllm, [s.image for s in samples])
        hits = sum(same_words(a, s.caption) for a, s in zip(said, samples, strict=True))
        lines.append(f"| {name} | {hits / len(samples):.1%} |")
    meant = [s.caption for s in drawn]
    said = describe(mllm, [s.image for s in drawn])
    parts = {"colours": COLOURS, "shapes": SHAPES, "numbers above one": NUMBERS.values(), "places": PLACES}
    for part, kinds in parts.items():
        lines.append(f"| scenes with just the right {part} | {words_right(said, meant, tuple(kinds)):.1%} |")
    lines += [
        "",
        "Greedy captions, samples picked by position, not by result:",
        "",
        "| set | true | said |",
        "|---|---|---|",
    ]
    for name, samples in (("train emoji", train_set), ("held-out emoji", unseen), ("held-out scene", drawn)):
        chosen = [samples[int(i)] for i in torch.linspace(3, len(samples) - 4, 10)]
        said = describe(mllm, [s.image for s in chosen])
        lines += [f"| {name} | {s.caption} | {a} |" for s, a in zip(chosen, said, strict=True)]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measures and writes the README; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mllm", type=Path, default=HERE / "mllm")
    parser.add_argument("--data", type=Path, default=HERE.parent / "data" / "fluent_emoji")
    parser.add_argument("--scenes", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    mllm = load_tiny_mllm(options.mllm)
    settings = json.loads((options.mllm / "training.json").read_text())
    text = README.format(
        parameters=sum(p.numel() for p in mllm.model.parameters()) / 1e6,
        side_px=SIDE_PX,
        width=mllm.model.lm_head.in_features,
        vocabulary=len(mllm.tokenizer),
        commands=commands(settings),
        trained=trained(settings),
        layer=settings["align_layer"],
        figures=figures(mllm, options.data, options.scenes),
    )
    (options.mllm / "README.md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
