"""A run -> a folder in the Hugging Face layout, tensor by tensor."""

import importlib.metadata
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from iomm import __version__
from iomm.autoencoder import LatentCodec, open_codec
from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.hf_card import model_card
from iomm.checkpoint.hf_layout import ADAPTER_PREFIX, REFERENCE, WEIGHTS, Manifest, whole_folder, write_json
from iomm.checkpoint.hf_run import RunWeights
from iomm.checkpoint.names import FAMILIES, their_config
from iomm.checkpoint.streaming import Spec, no_weights, total_bytes, write_safetensors
from iomm.config import Config, MllmConfig

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# What is copied of a frozen model's folder: weights as safetensors, settings, tokenizer files.
COPIED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")


def export_run(
    run_or_checkpoint: Path, out: Path, *, ema: bool = True, dtype: torch.dtype | None = None
) -> Path:
    """Write the generator of a run in the Hugging Face layout (`hf_layout`).

    Args:
        run_or_checkpoint: a run's folder (its newest checkpoint) or one checkpoint.
        out: a new folder. It appears when it is complete, or not at all.
        ema: the averaged weights instead of the last ones.
        dtype: of the transformer and the query adapter; None: as they are stored.
    Returns:
        `out`.
    Raises:
        CheckpointError: no checkpoint, a damaged one, no EMA in it, `out` exists, a full disk, or frozen
            models without safetensors.
        FileNotFoundError: the MLLM or autoencoder that it was trained with is no longer where it was.
        ValueError: settings that the stock class does not have.
    """
    weights = RunWeights(run_or_checkpoint, ema=ema)
    config = weights.config
    transformer = {name: _as(spec, dtype) for name, spec in weights.their_specs().items()}
    adapter = {name: _as(spec, dtype) for name, spec in weights.adapter.items()}
    settings = their_config(config.generator)
    codec = open_codec(config.codec, torch.float32, torch.device("cpu"))
    manifest = _manifest(weights, ema=ema, dtype=dtype)
    frozen = _local(config.codec.path), _local(config.mllm.path)
    copied = sum(f.stat().st_size for folder in frozen if folder for f in folder.iterdir() if f.is_file())
    with whole_folder(out, total_bytes(transformer.values()) + total_bytes(adapter.values()) + copied) as new:
        for name in ("transformer", "query_adapter", "vae", "scheduler", "text_encoder", "tokenizer"):
            (new / name).mkdir()
        write_json(new / "transformer" / "config.json", {**settings, "_diffusers_version": _diffusers()})
        write_safetensors(new / "transformer", WEIGHTS, transformer, weights.theirs)
        write_json(new / "query_adapter" / "config.json", _adapter_settings(config, adapter))
        write_safetensors(
            new / "query_adapter", WEIGHTS, adapter, lambda name: weights.get(ADAPTER_PREFIX + name)
        )
        _frozen_parts(config, codec, new)
        index = _model_index(config, codec, new)
        write_json(new / "model_index.json", index)
        for name, folder in (("pipeline.py", new), ("query_adapter.py", new / "query_adapter")):
            (folder / name).write_text(files("iomm.checkpoint.portable").joinpath(name).read_text())
        manifest.write(new)
        parameters = {"transformer": transformer, "query adapter": adapter}
        card = model_card(manifest, {k: _count(v) for k, v in parameters.items()})
        (new / "README.md").write_text(card, encoding="utf-8")
    return out


def _as(spec: Spec, dtype: torch.dtype | None) -> Spec:
    return spec if dtype is None else Spec(spec.shape, dtype)


def _count(specs: dict[str, Spec]) -> int:
    return sum(torch.Size(spec.shape).numel() for spec in specs.values())


def _diffusers() -> str:
    return importlib.metadata.version("diffusers")


def _manifest(weights: RunWeights, *, ema: bool, dtype: torch.dtype | None) -> Manifest:
    info = weights.info
    origin = info.extra.get("imported", {}).get("manifest")
    if origin is not None:  # weights that came from an export: it still says where they come from
        again = str(dtype).removeprefix("torch.") if dtype is not None else origin["dtype"]
        return Manifest(**{**origin, "config": info.config, "dtype": again})
    run_json = weights.checkpoint.parent.parent / "run.json"
    run: dict[str, Any] = json.loads(run_json.read_text()) if run_json.is_file() else {}
    return Manifest(
        config=info.config,
        step=info.step,
        weights="ema" if ema else "raw",
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        commit=run.get("git"),
        iomm_version=__version__,
    )


def _adapter_settings(config: Config, adapter: dict[str, Spec]) -> dict[str, Any]:
    condition = config.condition
    out_width, width = adapter["connector.out.weight"].shape
    return {
        "_class_name": "QueryAdapter",
        "_diffusers_version": _diffusers(),
        "width": width,
        "out_width": out_width,
        "queries": condition.queries,
        "adapter_heads": condition.adapter_heads,
        "condition_tokens": condition.condition_tokens,
        "connector_kind": condition.connector.kind,
        "connector_layers": condition.connector.layers,
        "connector_heads": condition.connector.heads,
        "aux_prompt": condition.aux_prompt,
        "null_prompt": condition.null_prompt,
        "max_caption_tokens": config.mllm.max_caption_tokens,
    }


def _frozen_parts(config: Config, codec: LatentCodec, new: Path) -> None:
    """vae/, scheduler/, text_encoder/, tokenizer/."""
    from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]
    from transformers import AutoTokenizer

    vae, mllm = _local(config.codec.path), _local(config.mllm.path)
    if vae is None:
        codec.vae.save_pretrained(new / "vae")
    else:
        _copy(vae, new / "vae")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=config.flow.shift)
    scheduler.save_pretrained(new / "scheduler")
    if mllm is None:
        reference = {"name": config.mllm.path, "revision": config.mllm.revision}
        write_json(new / "text_encoder" / REFERENCE, reference)
        tokenizer: Any = AutoTokenizer.from_pretrained(
            config.mllm.path, revision=config.mllm.revision, trust_remote_code=False
        )
        tokenizer.save_pretrained(new / "tokenizer")
        return
    _copy(mllm, new / "text_encoder")
    for pattern in TOKENIZER_FILES:
        for file in sorted(mllm.glob(pattern)):
            shutil.copyfile(file, new / "tokenizer" / file.name)


def _local(path: str) -> Path | None:
    """The folder of a frozen model; None: `path` is a hub name."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise FileNotFoundError(
            f"{path} is no folder, but the run was trained with the model in it, and the export carries a "
            "copy. Put it back there."
        )
    return None


def _copy(source: Path, target: Path) -> None:
    if not any(source.glob("*.safetensors")):
        raise CheckpointError(no_weights(source))
    for file in sorted(source.iterdir()):
        if file.suffix in COPIED and file.is_file():
            shutil.copyfile(file, target / file.name)


def _model_index(config: Config, codec: LatentCodec, new: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(new / "tokenizer", trust_remote_code=False)
    local = _local(config.mllm.path) is not None
    generator = config.generator
    return {
        "_class_name": ["pipeline", "IommPipeline"],
        "_diffusers_version": _diffusers(),
        "transformer": ["diffusers", FAMILIES[generator.family].their_class],
        "vae": ["diffusers", type(codec.vae).__name__],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", _architecture(config.mllm, new)] if local else [None, None],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "query_adapter": ["query_adapter", "QueryAdapter"],
        "prediction": generator.predict,
        "min_timestep": config.flow.min_timestep,
        "image_px": config.data.image_px,
        "patch": config.codec.patch,
        "pixels_per_token": codec.token_px,
        "token_channels": codec.token_channels,
        "guidance_value": generator.guidance_value if generator.guidance_embedding else None,
        "text_encoder_source": None
        if local
        else {"name": config.mllm.path, "revision": config.mllm.revision},
    }


def _architecture(mllm: MllmConfig, new: Path) -> str:
    named = json.loads((new / "text_encoder" / "config.json").read_text()).get("architectures")
    if not named:
        raise CheckpointError(
            f'{mllm.path}/config.json names no architecture. Add "architectures": ["..."], as '
            "save_pretrained writes it."
        )
    return named[0]
