"""Disk that the feature cache takes, known before a run."""

import torch

from iomm.data.feature_shards import Layout, row_bytes
from iomm.plan.shapes import latent_tokens
from iomm.plan.tables import Table
from iomm.plan.workload import Workload, varied

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def bytes_per_image(work: Workload) -> dict[str, int]:
    """Bytes on disk of one image, by encoder ("vae", "vit"), as the configuration keeps them.

    All its views count: each size of `data.progression`, and twice as many with `data.flip`. With
    `data.buckets` it is an upper bound, because no bucket has more tokens than the square.
    """
    config = work.config
    sides = {px for _, px in config.data.progression} or {config.data.image_px}
    rounded = config.data.cache_precision == "bf16"
    latent = torch.bfloat16 if rounded else _DTYPES[max(4, work.element_bytes)]
    patch = torch.bfloat16 if rounded else _DTYPES[work.element_bytes]
    outputs = ("mean", "logvar") if config.codec.sample else ("mean",)
    moments: Layout = {name: (latent, config.generator.token_channels) for name in outputs}
    patches: Layout = {"patches": (patch, work.mllm.lm.width)}
    flips = 2 if config.data.flip else 1
    tokens = [latent_tokens(work.codec, px, config.codec.patch) for px in sides]
    return {
        "vae": flips * sum(row_bytes(moments, count) for count in tokens),
        "vit": flips * len(sides) * row_bytes(patches, work.patch_tokens),
    }


def caches(work: Workload, distinct: float) -> Table:
    """What can be kept, and what this plan keeps."""
    config = work.config
    rows: list[tuple[str, str, str, str]] = []

    def add(name: str, size: float, use: str) -> None:
        rows.append((name, f"{size / 1024:,.0f}", f"{size * distinct / 1e12:,.2f}", use))

    for sample in (False, True):
        for precision in ("exact", "bf16"):
            other = varied(work, codec__sample=sample, data__cache_precision=precision)
            this = (sample, precision) == (config.codec.sample, config.data.cache_precision)
            dtype = "bf16" if precision == "bf16" else f"fp{8 * max(4, work.element_bytes)}"
            outputs = "mean and log-variance" if sample else "mean"
            use = _use(work, "vae") if this else "-"
            add(f"latents: {outputs}, {dtype}", bytes_per_image(other)["vae"], use)
    kept = bytes_per_image(work)
    add("ViT features", kept["vit"], _use(work, "vit"))
    add("what this plan keeps", sum(kept[encoder] for encoder in work.cached), "")
    views = (2 if config.data.flip else 1) * max(1, len(config.data.progression))
    note = (
        f"Views of an image: {views}. Log-variances are kept with codec.sample; bf16 is "
        "data.cache_precision. `iomm shard encode` fills the cache before a run."
    )
    title = f"Caches on disk, for {distinct / 1e6:,.1f} M images"
    return Table(title, ("what", "KiB an image", "TB", "this plan"), rows, [note])


def _use(work: Workload, encoder: str) -> str:
    return "used" if encoder in work.cached else "not used"
