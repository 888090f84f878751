"""Trains the tiny MLLM that ships in `examples/tiny/mllm/`: InternVL's layout, 4 M parameters.

    python -m examples.tiny.train_mllm --out examples/tiny/mllm     (repository root, one CPU core)

A frozen MLLM is where the generator gets its condition, so this one is trained on what it will be shown:

    image_caption   [ aux prompt | 16 patch tokens ], then the caption is predicted
    text            [ caption ], each token from those before
    align           at layer `align_layer`, the state after the last patch token and the state after the last
                    caption token of the same sample must find each other in the batch (InfoNCE)

The alignment loss has no head of its own: it acts on the hidden states themselves. It stands in for what
web-scale pre-training gives a real MLLM, namely that a picture and its caption put the model in similar
states. In some image sequences patch tokens are zeroed at random, as stage 1 of the method does, so that
masked conditions are not foreign.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from examples.tiny.mllm_data import SIDE_PX, Emoji, collate, load_emoji, training_sample, training_texts
from examples.tiny.mllm_model import AUX_PROMPTS, NULL_PROMPT, MllmTraining, build_model, losses
from examples.tiny.mllm_tokenizer import save_tokenizer, to_fast, train_sentencepiece

HERE = Path(__file__).parent


def learning_rate(settings: MllmTraining, step: int) -> float:
    """Linear warm-up, then a cosine down to the final learning rate; `step` counts from 0."""
    if step < settings.warm_up_steps:
        return settings.learning_rate * (step + 1) / settings.warm_up_steps
    done = (step - settings.warm_up_steps) / max(1, settings.steps - settings.warm_up_steps)
    return (
        settings.final_learning_rate
        + (settings.learning_rate - settings.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def build_optimizer(model: torch.nn.Module, settings: MllmTraining) -> torch.optim.AdamW:
    """AdamW (0.9, 0.98); weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def train(
    settings: MllmTraining,
    emoji: list[Emoji],
    tokenizer: PreTrainedTokenizerBase,
    on_step: Callable[[int, InternVLForConditionalGeneration, dict[str, float]], bool] | None = None,
    initial: dict[str, torch.Tensor] | None = None,
) -> InternVLForConditionalGeneration:
    """Trains a model, fresh or from `initial` weights, and returns it.

    `on_step(step, model, losses)` may stop the run by returning True. Deterministic for one thread: data are
    a function of (seed, sample index), masks and prompts of (seed, step).
    Raises FloatingPointError when the loss is not finite.
    """
    model = build_model(settings, len(tokenizer))
    if initial is not None:
        model.load_state_dict(initial)
    optimizer = build_optimizer(model, settings)
    prompts = [[], *([tokenizer.encode(p, add_special_tokens=False) for p in AUX_PROMPTS])]
    null_ids = tokenizer.encode(NULL_PROMPT, add_special_tokens=False)
    model.train()
    for step in range(settings.steps):
        rng = np.random.default_rng([settings.seed, step, 11])
        first = settings.first_sample + step * settings.batch_images
        samples = [
            training_sample(emoji, settings.seed, first + i, settings.emoji_of_4)
            for i in range(settings.batch_images)
        ]
        batch = collate(samples, tokenizer)
        prompt_ids = prompts[int(rng.choice(3, p=(0.35, 0.4, 0.25)))]
        parts = losses(model, batch, prompt_ids, null_ids, settings, rng)
        loss = (
            parts["image_caption"]
            + settings.text_weight * parts["text"]
            + settings.align_weight * parts["align"]
        )
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {step}; it must be finite. Lower learning_rate "
                f"(now {settings.learning_rate}) or raise warm_up_steps."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        if on_step is not None and on_step(
            step + 1, model, {name: float(part.detach()) for name, part in parts.items()}
        ):
            break
    return model.eval()


def save_model(
    model: InternVLForConditionalGeneration,
    sentencepiece_file: bytes,
    folder: Path,
    settings: MllmTraining,
    steps_done: int,
    before: dict[str, object] | None = None,
) -> None:
    """Writes weights (fp16), config, tokenizer, `preprocessor_config.json` and `training.json` into `folder`.

    `before` is the `training.json` of the run this one continued. All is written beside it first and moved
    file by file, so a reader never sees a torn file.
    """
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    weights = {name: tensor.detach().to(torch.float16).clone() for name, tensor in model.state_dict().items()}
    half = InternVLForConditionalGeneration(copy.deepcopy(model.config)).to(torch.float16)
    half.load_state_dict(weights)
    half.save_pretrained(partial)
    save_tokenizer(sentencepiece_file, partial)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE_PX, "width": SIDE_PX},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (partial / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (partial / "training.json").write_text(
        json.dumps(asdict(settings) | {"steps_done": steps_done, "before": before}, indent=2) + "\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.replace(folder / file.name)
    partial.rmdir()


def train_tokenizer(emoji: list[Emoji], settings: MllmTraining) -> bytes:
    """The SentencePiece file for this training set."""
    return train_sentencepiece(
        training_texts(emoji, (*AUX_PROMPTS, NULL_PROMPT), settings.seed), settings.vocabulary
    )


def starting_point(
    init: Path | None, emoji: list[Emoji], settings: MllmTraining
) -> tuple[bytes, dict[str, torch.Tensor] | None, dict[str, object] | None]:
    """SentencePiece file, weights, `training.json` to start from: those of `init`, or a new tokenizer alone.

    Raises ValueError when `init` holds no saved model.
    """
    if init is None:
        return train_tokenizer(emoji, settings), None, None
    if not (init / "model.safetensors").is_file():
        raise ValueError(
            f"--init {init} holds no model.safetensors. Give the --out folder of an earlier run."
        )
    model = InternVLForConditionalGeneration.from_pretrained(init, dtype=torch.float32, local_files_only=True)
    before = json.loads((init / "training.json").read_text())
    return (init / "tokenizer.model").read_bytes(), model.state_dict(), before


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=MllmTraining().steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=MllmTraining().learning_rate)
    parser.add_argument("--warm-up-steps", type=int, default=MllmTraining().warm_up_steps)
    parser.add_argument("--first-sample", type=int, default=0, help="where in the sample stream to begin")
    parser.add_argument("--emoji-of-4", type=int, default=2, help="of four samples, how many are emoji")
    parser.add_argument(
        "--init", type=Path, help="folder of a saved model to continue from, tokenizer included"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after this much wall time and save what there is"
    )
    parser.add_argument("--save-every", type=int, default=500, help="steps between intermediate saves")
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parent / "data" / "fluent_emoji",
        help="folder of the train-*.tar shards",
    )
    parser.add_argument("--out", type=Path, default=HERE / "mllm")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Trains, saves to `--out` and reports the losses; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    settings = MllmTraining(
        steps=options.steps,
        seed=options.seed,
        learning_rate=options.learning_rate,
        warm_up_steps=options.warm_up_steps,
        first_sample=options.first_sample,
        emoji_of_4=options.emoji_of_4,
    )
    emoji = load_emoji(sorted(options.data.glob("train-*.tar")))
    sentencepiece_file, initial, before = starting_point(options.init, emoji, settings)
    console = Console(stderr=True)
    began, average, done = time.monotonic(), {}, 0
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "training_log.jsonl"
    log.unlink(missing_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.steps)

        def on_step(step: int, model: InternVLForConditionalGeneration, parts: dict[str, float]) -> bool:
            nonlocal done
            done = step
            for name, part in parts.items():
                average[name] = part if name not in average else 0.98 * average[name] + 0.02 * part
            told = "  ".join(f"{name} {value:.3f}" for name, value in average.items())
            progress.update(task, advance=1, description=f"step {step}  {told}")
            minutes = (time.monotonic() - began) / 60
            if step % 50 == 0:
                with log.open("a") as file:
                    rounded = {name: round(value, 4) for name, value in average.items()}
                    file.write(json.dumps({"step": step, "minutes": round(minutes, 2), **rounded}) + "\n")
            if step % options.save_every == 0 and step < settings.steps:
                save_model(model, sentencepiece_file, options.out, settings, step, before)
            return minutes > options.minutes

        model = train(settings, emoji, to_fast(sentencepiece_file), on_step, initial)
    save_model(model, sentencepiece_file, options.out, settings, done, before)
    console.print(f"saved {options.out} after {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
