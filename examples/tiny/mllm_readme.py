"""The words around the figures in the README of a trained tiny MLLM; `mllm_report.py` fills them in."""

from typing import Any

README = """# The tiny MLLM

A {parameters:.2f} M parameter model in InternVL's layout (transformers `InternVLForConditionalGeneration`:
ViT, 2x2 pixel shuffle, Qwen2), trained from scratch as a captioner, so that the default run has a real
frozen MLLM and needs no download. {side_px} px images become 16 visual tokens of width {width}; images are
scaled to (x / 255 - 0.5) / 0.5 (`preprocessor_config.json`). Weights are stored in fp16. The tokenizer is
a SentencePiece unigram model of {vocabulary} pieces with byte fallback (`tokenizer.model`, the same model
as `tokenizer.json`).

{commands}
    python -m examples.tiny.mllm_report --mllm examples/tiny/mllm     # measures and writes this file

It saw the train shards of `examples/data/fluent_emoji` (augmented) and drawn shape scenes:

{trained}

The vision phase supervises ViT and projector alone on what each visual token shows of a scene and on which
emoji it is; it stands in for the contrastive pre-training of a real MLLM's ViT (`mllm_vision.py`). In the
caption phase an alignment loss (InfoNCE between image and caption states at the output of language model
layer {layer}, no head) stands in for what web-scale pre-training gives a real MLLM.

Held-out emoji were never read in training; held-out scenes are those whose caption is in the tenth that
`shape_scenes.is_heldout` keeps back. All settings: `training.json`; both losses and what was set aside, step
by step: `training_log.jsonl`.

A held-out emoji is a concept whose name the model has not seen, so its captions are guesses by likeness; what
carries over shows in retrieval and in the gap between its own image and another. Scenes test composition:
known words in unseen sentences.

Trained for about an hour of a shared core in all, it tells colours, numbers and places apart; shapes it
mostly still mixes up, and it knows most emoji by likeness, not by name. More steps of both phases help.

{figures}
"""


# The run that the shipped model continues; that commit holds its script, its commands and its weights.
FIRST_RUN_COMMIT = "f9d9285"


def commands(run: dict[str, Any]) -> str:
    """The commands that train the model again, indented for Markdown."""
    train = f"    python -m examples.tiny.train_mllm --seed {run['seed']} --out examples/tiny/mllm"
    rounds = " ".join(str(vision["steps"]) for vision in run["vision"])
    steps = f"        --vision-steps {rounds} --steps {run['steps']}"
    if run["before"] is None:
        return f"{train} \\\n{steps}"
    fetch = f"    git worktree add runs/before {FIRST_RUN_COMMIT}"
    return f"{fetch}\n{train} \\\n{steps} \\\n        --init runs/before/examples/tiny/mllm --keep last"


def trained(run: dict[str, Any]) -> str:
    """What the runs were, in order, as a Markdown list."""
    items = []
    if run["before"] is not None:
        items.append(
            "a first run without a vision phase, on all train emoji "
            f"(commit {FIRST_RUN_COMMIT}, whose README has its commands)"
        )
    items += [
        f"vision: {v['steps']} steps of {v['batch_scenes']} scenes and {v['batch_emoji']} emoji"
        for v in run["vision"]
    ]
    last = run["steps_done"] == run["steps"]
    kept = "the last step is kept" if last else f"step {run['steps_done']} is kept"
    items.append(
        f"captions: {run['steps']} steps of {run['batch_images']} images, emoji and scenes in turn; {kept}"
    )
    return "\n".join(f"{place}. {item}" for place, item in enumerate(items, start=1))
