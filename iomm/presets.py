"""Presets: functions that return a `Config`. A variant is `dataclasses.replace` of one.

The paper prints parameter counts, not widths; the shapes below give its counts (METHOD.md section 3).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from iomm.config import (
    CodecConfig,
    ConditionConfig,
    Config,
    ConnectorConfig,
    DataConfig,
    FlowConfig,
    GeneratorConfig,
    MllmConfig,
    OptimizerConfig,
    TrainConfig,
)


def tiny(
    name: str, examples: Path, *, steps: int, lr: float = 2e-3, mix_ratio: float = 1.0, seed: int = 0
) -> Config:
    """Six million parameters, 64 px, 16 latent tokens: every step of a cluster's run, on a laptop.

    It predicts the clean latent: at this size that learns much sooner than predicting the velocity.

    Args:
        examples: the repository's examples/ folder, which holds the images, the autoencoder and the MLLM.
    """
    shards = examples / "data" / "fluent_emoji"
    train = (str(shards / "train-*.tar"),)
    return Config(
        name=name,
        generator=GeneratorConfig(
            hidden_size=192,
            heads=6,
            double_blocks=4,
            rope_axes=(8, 12, 12),
            condition_width=192,
            predict="clean",
        ),
        mllm=MllmConfig(path=str(examples / "tiny" / "mllm"), max_caption_tokens=64),
        codec=CodecConfig(path=str(examples / "tiny" / "vae")),
        # Clean prediction weighs the velocity loss by 1 / t^2; t drawn towards noise keeps the weights even.
        flow=FlowConfig(timestep="logit_normal", logit_mean=0.8, logit_std=0.8),
        condition=ConditionConfig(
            queries=8,
            adapter_heads=4,
            mask_ratio=0.5,
            connector=ConnectorConfig(kind="transformer", layers=1, heads=4),
        ),
        data=DataConfig(
            images=train,
            pairs=train,
            heldout=(str(shards / "heldout-*.tar"),),
            mix_ratio=mix_ratio,
            image_px=64,
            cache_dir="runs/cache",
            decode_threads=1,
        ),
        optimizer=OptimizerConfig(lr=lr, warmup_steps=50, schedule="cosine", min_lr=1e-4, ema_decay=0.99),
        train=TrainConfig(
            steps=steps,
            global_batch_images=32,
            micro_batch_images=32,
            seed=seed,
            precision="fp32",
            save_every_steps=300,
            eval_every_steps=300,
            eval_images=96,
            sample_every_steps=300,
            log_every_steps=10,
        ),
    )


Stream = Literal["image", "pair", "mix"]
# Share of image-only samples; the paper mixes half and half.
MIX_RATIO: dict[Stream, float] = {"image": 1.0, "pair": 0.0, "mix": 0.5}
RECIPE_STEPS = (3750, 3750)  # of the two stages, of 64 images


def recipe(first: Literal["image", "pair"], second: Stream | None, root: Path, *, seed: int = 0) -> Config:
    """A stage of one of the paper's six recipes in miniature, on the shapes world: pre-training on images or
    on pairs, then fine-tuning on images, on pairs or on both (METHOD.md section 5).

    All first stages cost the same, and all second stages. Muon, because AdamW learns here what a caption says
    four times as slowly (examples/recipes/README.md). Only the second stage ends with a falling learning
    rate.

    Args:
        first: what the first stage is trained on.
        second: what the second stage is; None: this is the first stage.
        root: the repository. Shards, runs and features are under its runs/recipes.
    """
    folder = root / "runs" / "recipes"
    name = first if second is None else f"{first}_{second}"
    config = tiny(
        f"{name}-seed{seed}",
        root / "examples",
        steps=RECIPE_STEPS[second is not None],
        lr=3e-3,
        mix_ratio=MIX_RATIO[second or first],
        seed=2 * seed + (second is not None),  # the second stage draws anew
    )
    shards = {part: (str(folder / "shapes" / part / "set.index"),) for part in ("images", "pairs", "heldout")}
    data = dataclasses.replace(config.data, **shards, cache_dir=str(folder / "cache"))
    start = None if second is None else str(folder / "runs" / f"{first}-seed{seed}")
    optimizer = dataclasses.replace(
        config.optimizer,
        kind="muon",
        warmup_steps=100,
        schedule="constant" if second is None else "cosine",
    )
    train = dataclasses.replace(
        config.train,
        global_batch_images=64,
        micro_batch_images=64,
        init_from=start,
        save_every_steps=250,
        eval_every_steps=250,
        sample_every_steps=500,
    )
    return dataclasses.replace(
        config, data=data, optimizer=optimizer, train=train, out_dir=str(folder / "runs")
    )


def _flux(
    name: str,
    *,
    double_blocks: int,
    steps: int,
    global_batch_images: int,
    micro_batch_images: int,
    images: Sequence[str],
    ema_decay: float | None,
) -> Config:
    return Config(
        name=name,
        generator=GeneratorConfig(
            hidden_size=1536, heads=12, double_blocks=double_blocks, condition_width=1536
        ),
        mllm=MllmConfig(path="OpenGVLab/InternVL3-2B-hf"),
        codec=CodecConfig(path="weights/flux/vae"),
        condition=ConditionConfig(queries=256, adapter_heads=12, mask_ratio=0.85),
        data=DataConfig(images=tuple(images)),
        optimizer=OptimizerConfig(ema_decay=ema_decay),
        train=TrainConfig(
            steps=steps,
            global_batch_images=global_batch_images,
            micro_batch_images=micro_batch_images,
            precision="bf16",
        ),
    )


def b(name: str, images: Sequence[str]) -> Config:
    """IOMM-B, 1.6 B parameters: 11 M images x 10 epochs at batch 1024, EMA 0.999 (paper table of
    settings)."""
    return _flux(
        name,
        double_blocks=19,
        steps=107_000,
        global_batch_images=1024,
        micro_batch_images=16,
        images=images,
        ema_decay=0.999,
    )


def large(name: str, images: Sequence[str]) -> Config:
    """IOMM-L, 2.7 B parameters: 11 M images x 5 epochs at batch 512, no EMA."""
    return _flux(
        name,
        double_blocks=32,
        steps=107_000,
        global_batch_images=512,
        micro_batch_images=8,
        images=images,
        ema_decay=None,
    )


def xl(name: str, images: Sequence[str]) -> Config:
    """IOMM-XL, 6 B parameters, Z-Image's shape: stage 1 at batch 4096, mask ratio 0.45, no EMA.

    Muon, as in the paper, with the learning rate of the others. It prints no length: these steps see as many
    images as B's.
    """
    return Config(
        name=name,
        generator=GeneratorConfig(
            family="z_image",
            hidden_size=3840,
            heads=30,
            double_blocks=0,
            single_blocks=30,
            refiner_blocks=2,
            rope_axes=(32, 48, 48),
            rope_theta=256.0,
            condition_width=2560,
        ),
        mllm=MllmConfig(path="OpenGVLab/InternVL3-2B-hf"),
        codec=CodecConfig(path="weights/flux/vae"),
        condition=ConditionConfig(queries=256, adapter_heads=12, mask_ratio=0.45),
        data=DataConfig(images=tuple(images)),
        optimizer=OptimizerConfig(kind="muon", ema_decay=None),
        train=TrainConfig(steps=27_000, global_batch_images=4096, micro_batch_images=4, precision="bf16"),
    )
