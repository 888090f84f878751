"""A run small enough for tests: random frozen models in their real layouts, drawn images, a 40 k-parameter
generator."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from iomm.config import (
    CodecConfig,
    ConditionConfig,
    Config,
    ConnectorConfig,
    DataConfig,
    GeneratorConfig,
    MllmConfig,
    OptimizerConfig,
    TrainConfig,
)
from iomm.data.indexer import index_shard
from tests.tiny_models import save_internvl, save_vae

COLOURS = ("red", "green", "blue", "gold", "pink", "black")
IMAGE_PX = 32


def draw_png(i: int, size_px: tuple[int, int] = (IMAGE_PX, IMAGE_PX)) -> bytes:
    image = Image.new("RGB", size_px, "white")
    x, y = 3 * (i % 5), 2 * (i % 7)
    ImageDraw.Draw(image).ellipse((x, y, x + 14, y + 14), fill=COLOURS[i % len(COLOURS)])
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_images(path: Path, first: int, count: int, captions_every: int = 1) -> Path:
    """Shard of drawn images with keys i0000...; every `captions_every`-th has a caption."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        members.append((f"i{i:04d}.png", draw_png(i)))
        if i % captions_every == 0:
            members.append((f"i{i:04d}.txt", f"{COLOURS[i % len(COLOURS)]} ball".encode()))
    return write_shard(path, members)


def write_shapes(path: Path) -> Path:
    """24 captioned images, square, tall and wide in turn, with an index."""
    sizes_px, members = ((72, 72), (40, 150), (150, 40)), []
    for i in range(24):
        members.append((f"i{i:04d}.png", draw_png(i, sizes_px[i % 3])))
        members.append((f"i{i:04d}.txt", f"{COLOURS[i % len(COLOURS)]} ball".encode()))
    write_shard(path, members)
    index_shard(str(path))
    return path


def build_world(folder: Path) -> Path:
    """Frozen models and shards for `small_config`."""
    save_internvl(folder / "mllm")
    save_vae(folder / "vae")
    write_images(folder / "train.tar", 0, 40, captions_every=2)
    write_images(folder / "heldout.tar", 40, 8)
    write_shapes(folder / "shapes.tar")
    return folder


def small_config(world: Path, out: Path, name: str = "run", **settings: Any) -> Config:
    """12 steps of 8 images; `settings` override by dotted name with "__" for "."."""
    train = (str(world / "train.tar"),)
    config = Config(
        name=name,
        out_dir=str(out),
        generator=GeneratorConfig(
            hidden_size=32, heads=2, double_blocks=2, rope_axes=(4, 6, 6), condition_width=24, predict="clean"
        ),
        mllm=MllmConfig(path=str(world / "mllm"), max_caption_tokens=80),
        codec=CodecConfig(path=str(world / "vae")),
        condition=ConditionConfig(
            queries=4,
            adapter_heads=2,
            mask_ratio=0.5,
            aux_prompt="the same as:",
            connector=ConnectorConfig(kind="transformer", layers=1, heads=2),
        ),
        data=DataConfig(
            images=train,
            pairs=train,
            heldout=(str(world / "heldout.tar"),),
            image_px=IMAGE_PX,
            decode_threads=1,
        ),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2, ema_decay=0.9),
        train=TrainConfig(
            steps=12,
            global_batch_images=8,
            micro_batch_images=8,
            precision="fp32",
            save_every_steps=4,
            eval_every_steps=6,
            eval_images=8,
            sample_every_steps=12,
            sample_steps=2,
            log_every_steps=1,
            wandb="disabled",
        ),
    )
    return config.override(
        [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    )


def config_file(config: Config, path: Path) -> Path:
    """A configuration file for the command line."""
    body = f"def config():\n    return Config.from_dict({config.to_dict()!r})\n"
    path.write_text(f"from iomm.config import Config\n\n\n{body}")
    return path


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; of repeated steps the last one, a torn line left out."""
    out: dict[int, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["kind"] == "train":
            out[record["step"]] = record["loss"]
    return out


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith('{"kind": "event"')]
    return [record for record in records if record["event"] == kind]
