"""The model card of an exported folder: what it is, how it was trained, how to paint with it."""

from collections.abc import Mapping
from pathlib import Path

from iomm.checkpoint.hf_layout import Manifest
from iomm.config import Config, OptimizerConfig

_HEAD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [iomm, flow-matching, image-only-pre-training]
---
# {title}

A text-to-image generator trained with iomm: {stage}, after IOMM (arXiv 2603.16139).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
pipe("a red ball", seed=0, guidance_scale=3.0).images[0].save("ball.png")
```

The transformer alone is a stock class and needs no remote code: `{loader}.from_pretrained("FOLDER",
subfolder="transformer")`. `iomm import FOLDER -o RUN` makes a checkpoint of it to train on.

| | |
|---|---|
"""


def model_card(manifest: Manifest, parameters: Mapping[str, int]) -> str:
    """README.md. Nothing in it depends on the machine but the names of files.

    Args:
        parameters: numbers by part.
    """
    from iomm.checkpoint.names import FAMILIES

    config = Config.from_dict(manifest.config)
    facts = _facts(manifest, config)
    facts[2:2] = [(f"parameters, {part}", f"{count:,}") for part, count in parameters.items()]
    head = _HEAD.format(
        title=config.name, stage=_stage(config), loader=FAMILIES[config.generator.family].their_class
    )
    return head + "".join(f"| {name} | {value} |\n" for name, value in facts)


def _stage(config: Config) -> str:
    if config.data.mix_ratio == 1.0:
        return "stage 1, images without captions"
    images = config.data.mix_ratio
    return f"{images:.0%} images without captions, {1 - images:.0%} text-image pairs"


def _facts(manifest: Manifest, config: Config) -> list[tuple[str, str]]:
    data, train, optimizer, condition = config.data, config.train, config.optimizer, config.condition
    samples = manifest.step * train.global_batch_images
    start = "random" if train.init_from is None else Path(train.init_from).name
    return [
        ("run", config.name),
        ("weights", "average over training (EMA)" if manifest.weights == "ema" else "the last step's (raw)"),
        ("steps", f"{manifest.step:,} of {train.global_batch_images:,} images: {samples:,} samples seen"),
        ("started from", start),
        ("image shards", _names(data.images)),
        ("text-image shards", _names(data.pairs)),
        ("image side", f"{data.image_px} px"),
        ("mask", f"{condition.mask_mode}, ratio {condition.mask_ratio}, null {condition.null_probability}"),
        ("queries", str(condition.queries)),
        ("multimodal LLM", _model(config.mllm.path, config.mllm.revision)),
        ("autoencoder", _model(config.codec.path, config.codec.revision)),
        ("network predicts", config.generator.predict),
        ("timesteps", f"{config.flow.timestep}, shift {config.flow.shift}"),
        (
            "optimizer",
            f"{_optimizer(optimizer)}, lr {optimizer.lr}, weight decay {optimizer.weight_decay}, "
            f"{optimizer.warmup_steps:,} warm-up steps, {optimizer.schedule}",
        ),
        ("precision", f"{train.precision}; stored as {manifest.dtype or 'trained'}"),
        ("seed", str(train.seed)),
        ("code", f"iomm {manifest.iomm_version}, commit {manifest.commit or 'unknown'}"),
    ]


def _optimizer(of: OptimizerConfig) -> str:
    adamw = f"AdamW (betas {of.betas})"
    if of.kind == "adamw":
        return adamw
    steps = f"{of.muon_newton_schulz_steps} Newton-Schulz steps"
    return f"Muon (momentum {of.muon_momentum}, {steps}), other weights {adamw}"


def _names(patterns: tuple[str, ...]) -> str:
    return ", ".join(f"`{Path(p).name}`" for p in patterns) or "none"


def _model(path: str, revision: str | None) -> str:
    name = Path(path).name if Path(path).is_absolute() or path.count("/") > 1 else path
    return f"`{name}`" if revision is None else f"`{name}`, revision {revision}"
