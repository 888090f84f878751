"""`iomm demo`: the whole job on the shipped images, on a machine with no GPU.

stage 1 (images only) -> stage 2 (images and a few pairs) -> pictures of 24 prompts -> report
"""

import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console

import iomm
from iomm.checkpoint.generator import open_generator
from iomm.config import Config
from iomm.evaluation.grid import image_grid, save_png
from iomm.evaluation.report import build_report
from iomm.presets import tiny
from iomm.sampling import paint
from iomm.training.train import train
from iomm.training.watch import example_prompts

STEPS = (1200, 400)  # of stage 1 and stage 2
PROMPTS_EACH = 12  # from training pairs, and held out
SEED, SAMPLER_STEPS, GUIDANCE = 7, 25, 3.0


def examples_folder() -> Path:
    """The repository's examples/, which holds the images and the tiny models.

    Raises:
        FileNotFoundError: iomm was installed without it.
    """
    folder = Path(iomm.__file__).parents[1] / "examples"
    if not (folder / "tiny" / "mllm" / "config.json").is_file():
        raise FileNotFoundError(
            f"no examples at {folder}: the demo's images and models are in the repository. Run "
            "it from a clone (`make demo`)."
        )
    return folder


def demo_configs(out: Path, fraction: float = 1.0) -> tuple[Config, Config]:
    """The two stages. `fraction` scales the steps of both (at least 4 each)."""
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction} must lie in (0, 1].")
    examples = examples_folder()
    steps = [max(4, round(n * fraction)) for n in STEPS]
    stage1 = tiny("stage1", examples, steps=steps[0])
    stage2 = tiny("stage2", examples, steps=steps[1], lr=5e-4, mix_ratio=0.75, seed=1)
    configs = []
    for config in (stage1, stage2):
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=max(1, round(50 * fraction)))
        data = dataclasses.replace(config.data, cache_dir=str(out / "cache"))
        configs.append(dataclasses.replace(config, out_dir=str(out), optimizer=optimizer, data=data))
    first, second = configs
    return first, dataclasses.replace(
        second, train=dataclasses.replace(second.train, init_from=str(first.run_dir))
    )


def run_demo(out: Path, fraction: float = 1.0) -> int:
    """Train, paint and report; returns 0, or 130 if a stage was stopped."""
    console, began = Console(highlight=False), time.monotonic()
    say = lambda line: console.print(line, soft_wrap=True, markup=False)  # noqa: E731
    first, second = demo_configs(out, fraction)
    for number, config in enumerate((first, second), start=1):
        what = "images only" if number == 1 else "three images to one captioned image"
        say(
            f"Stage {number} of 2: {what}, {config.train.steps} steps of "
            f"{config.train.global_batch_images} images"
        )
        outcome = train(config)
        if outcome.stopped_by is not None:
            say(
                f"stopped after step {outcome.step} of stage {number}; saved. The same command "
                "goes on from there."
            )
            return 130
    grid = paint_prompts(second, out / "samples.png")
    reports = [build_report(config.run_dir) for config in (first, second)]
    say(f"\nTook {(time.monotonic() - began) / 60:.1f} minutes. {_gain(second.run_dir)}")
    say(f"Pictures of 12 captions seen in pairs (upper rows) and 12 held-out ones: {grid}")
    say(f"Reports: {reports[0]}  {reports[1]}")
    say(f'Paint your own: iomm sample {second.run_dir} --prompt "red apple" -o apple.png')
    return 0


def paint_prompts(config: Config, path: Path) -> Path:
    """The grid of 12 seen and 12 held-out captions, from the run's EMA weights."""
    _, encoders, system = open_generator(config.run_dir, ema=True)
    seen, heldout = example_prompts(config.data, PROMPTS_EACH)
    prompts = seen + heldout
    pictures = paint(system, encoders, prompts, seed=SEED, steps=SAMPLER_STEPS, guidance=GUIDANCE)
    return save_png(image_grid(pictures, PROMPTS_EACH // 2, prompts, cell_px=112), path)


def _gain(run_dir: Path) -> str:
    """How much the conditions help on held-out samples, from the last evaluation."""
    evals = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        if '"kind": "eval"' in line
    ]
    if not evals:
        return "No evaluation was logged."
    loss = evals[-1]["velocity_loss"]
    gains = {name: 1 - loss[name] / loss["null"] for name in ("image", "text")}
    parts = [
        f"{name} condition {loss[name]:.4f} ({abs(gain):.1%} {'lower' if gain > 0 else 'higher'})"
        for name, gain in gains.items()
    ]
    return f"Held-out velocity loss: null condition {loss['null']:.4f}, {', '.join(parts)}."
