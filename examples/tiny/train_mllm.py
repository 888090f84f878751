"""Trains the tiny MLLM that ships in `examples/tiny/mllm/`: InternVL's layout, 4 M parameters.

    python -m examples.tiny.train_mllm --out examples/tiny/mllm     (repository root, one CPU core)

First the vision side learns to see (`mllm_vision.py`), then all of it learns to caption. A frozen MLLM is
where the generator gets its condition, so this one is trained on what it will be shown:

    image_caption   [ aux prompt | 16 patch tokens ], then the caption is predicted
    text            [ caption ], each token from those before
    align           at layer `align_layer`, the state after the last patch token and the state after the last
                    caption token of the same sample must find each other in the batch (InfoNCE)

`--aligned` adds what draws pictures and captions together where the generator reads them (the shipped model
does without, and an image-only generator of it hears no caption; examples/recipes/README.md):

    queries         random queries behind an image and behind its caption: the same, for the final states
    patch_words     the mean patch token, through the language model's head, says the caption's words

and half the captions are worded as the shapes world's prompts are.

The alignment loss has no head of its own: it acts on the hidden states themselves. It stands in for what
web-scale pre-training gives a real MLLM, namely that a picture and its caption put the model in similar
states. In some image sequences patch tokens are zeroed at random, as stage 1 of the method does, so that
masked conditions are not foreign.

One train emoji in twenty is set aside (`mllm_data.is_set_aside`): the weights kept are those of the step that
does best on them and on scenes that were not trained on (with `--keep last`, of the last step). Held-out
shards are never read here.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from examples.tiny.mllm_choice import BestStep
from examples.tiny.mllm_data import (
    SIDE_PX,
    Emoji,
    collate,
    framed,
    is_set_aside,
    load_emoji,
    training_batch,
    training_texts,
)
from examples.tiny.mllm_model import AUX_PROMPTS, NULL_PROMPT, MllmTraining, build_model, losses
from examples.tiny.mllm_tokenizer import save_tokenizer, to_fast, train_sentencepiece
from examples.tiny.mllm_vision import VisionTraining, vision_phase

HERE = Path(__file__).parent
VISION_STEPS = (1200, 900)  # of the two rounds of the vision phase
LOOK_EVERY = 100  # steps between looks at what is set aside


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
    model: InternVLForConditionalGeneration | None = None,
) -> InternVLForConditionalGeneration:
    """Trains `model` in place, or a fresh one, to caption, and returns it.

    `on_step(step, model, losses)` may stop the run by returning True. Deterministic for one thread: data are
    a function of (seed, sample index), masks and prompts of (seed, step). Matrix products are in bf16,
    weights in fp32. Raises FloatingPointError when the loss is not finite.
    """
    if model is None:
        model = build_model(settings, len(tokenizer))
    optimizer = build_optimizer(model, settings)
    prompts = [[], *([tokenizer.encode(p, add_special_tokens=False) for p in AUX_PROMPTS])]
    null_ids = tokenizer.encode(NULL_PROMPT, add_special_tokens=False)
    model.train()
    model.set_attn_implementation("eager")  # the fused one is slower in bf16 at these sizes
    for step in range(settings.steps):
        rng = np.random.default_rng([settings.seed, step, 11])
        samples = training_batch(emoji, settings.seed, step, settings.batch_images)
        if settings.framed_fraction:
            frames_rng = np.random.default_rng([settings.seed, step, 17])
            samples = framed(samples, settings.framed_fraction, frames_rng)
        batch = collate(samples, tokenizer)
        prompt_ids = prompts[int(rng.choice(3, p=(0.35, 0.4, 0.25)))]
        with torch.autocast("cpu", torch.bfloat16):
            parts = losses(model, batch, prompt_ids, null_ids, settings, rng)
        loss = (
            parts["image_caption"]
            + settings.text_weight * parts["text"]
            + settings.align_weight * parts["align"]
            + settings.query_weight * parts.get("queries", 0.0)
            + settings.patch_words_weight * parts.get("patch_words", 0.0)
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
    vision: Sequence[VisionTraining] = (),
    before: dict[str, object] | None = None,
) -> None:
    """Writes weights (fp16), config, tokenizer, `preprocessor_config.json` and `training.json` into `folder`.

    `vision` are the settings of the first phase's rounds, `before` is the `training.json` of the run this one
    continued. All is written beside it first and moved file by file, so a reader never sees a torn file.
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
        "do_center_crop": False,  # CLIP's own default is a crop of 224 px
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (partial / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    phases = {
        "steps_done": steps_done,
        "vision": [asdict(v) for v in vision],
        "before": before,
    }
    (partial / "training.json").write_text(json.dumps(asdict(settings) | phases, indent=2) + "\n")
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
) -> tuple[bytes, InternVLForConditionalGeneration, dict[str, object] | None]:
    """SentencePiece file, model and `training.json` to start from: those of `init`, or fresh ones.

    Raises ValueError when `init` holds no saved model.
    """
    if init is None:
        file = train_tokenizer(emoji, settings)
        return file, build_model(settings, len(to_fast(file))), None
    if not (init / "model.safetensors").is_file():
        raise ValueError(
            f"--init {init} holds no model.safetensors. Give the --out folder of an earlier run."
        )
    saved = InternVLForConditionalGeneration.from_pretrained(
        init, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    model = build_model(settings, saved.lm_head.out_features)
    model.load_state_dict(saved.state_dict())
    return (init / "tokenizer.model").read_bytes(), model, json.loads((init / "training.json").read_text())


def caption_phase(
    model: InternVLForConditionalGeneration,
    emoji: list[Emoji],
    tokenizer: PreTrainedTokenizerBase,
    settings: MllmTraining,
    out: Path,
    minutes: float,
    keep_best: bool,
    progress: Progress,
) -> int:
    """Trains `model` in place on all emoji but those set aside; it ends with the weights kept.

    Returns that step. Losses go to `out/training_log.jsonl`. Ends early after `minutes` of wall time.
    """
    best = BestStep([e for e in emoji if is_set_aside(e.label)], tokenizer, settings)
    log = out / "training_log.jsonl"
    log.unlink(missing_ok=True)
    task = progress.add_task("captions", total=settings.steps)
    began, average, done = time.monotonic(), dict[str, float](), 0

    def on_step(step: int, model: InternVLForConditionalGeneration, parts: dict[str, float]) -> bool:
        nonlocal done
        done = step
        for name, part in parts.items():
            average[name] = part if name not in average else 0.98 * average[name] + 0.02 * part
        told = "  ".join(f"{name} {value:.3f}" for name, value in average.items())
        progress.update(task, advance=1, description=f"captions {step}  {told}")
        spent = (time.monotonic() - began) / 60
        last = step == settings.steps or spent > minutes
        if step % LOOK_EVERY == 0 or last:
            row = {"step": step, "minutes": spent} | average | best.look(step, model)
            with log.open("a") as file:
                file.write(json.dumps({name: round(value, 4) for name, value in row.items()}) + "\n")
        return last

    train(settings, [e for e in emoji if not is_set_aside(e.label)], tokenizer, on_step, model)
    if not keep_best:
        return done
    model.load_state_dict(best.weights)
    return best.step


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=MllmTraining().steps, help="of the caption phase")
    parser.add_argument(
        "--vision-steps", type=int, nargs="+", default=list(VISION_STEPS), help="of each vision round"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="folder of a saved model to continue from, tokenizer included"
    )
    parser.add_argument(
        "--aligned", action="store_true", help="draw the states behind pictures and captions together"
    )
    parser.add_argument(
        "--keep",
        choices=("best", "last"),
        default="best",
        help="step of the caption phase; last where --init has been trained on the emoji set aside",
    )
    parser.add_argument(
        "--vision",
        type=Path,
        help="safetensors file of the vision phase: read if it exists, else trained and written",
    )
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="end the caption phase after this much wall time"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parent / "data" / "fluent_emoji",
        help="folder of the train-*.tar shards",
    )
    parser.add_argument("--out", type=Path, default=HERE / "mllm")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Trains both phases and saves to `--out`; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    settings = MllmTraining(steps=options.steps, seed=options.seed)
    if options.aligned:
        settings = replace(settings, query_weight=1.0, patch_words_weight=0.5, framed_fraction=0.5)
    rounds = [
        VisionTraining(steps=steps, seed=options.seed + i) for i, steps in enumerate(options.vision_steps)
    ]
    emoji = load_emoji(sorted(options.data.glob("train-*.tar")))
    sentencepiece_file, model, before = starting_point(options.init, emoji, settings)
    tokenizer = to_fast(sentencepiece_file)
    options.out.mkdir(parents=True, exist_ok=True)
    console, began = Console(stderr=True), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        learned = [e for e in emoji if not is_set_aside(e.label)]
        vision_phase(model, learned, tokenizer, rounds, options.vision, progress)
        kept = caption_phase(
            model,
            emoji,
            tokenizer,
            settings,
            options.out,
            options.minutes,
            options.keep == "best",
            progress,
        )
    save_model(model, sentencepiece_file, options.out, settings, kept, rounds, before)
    console.print(f"saved step {kept} to {options.out} after {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
