"""A folder in the Hugging Face layout -> a checkpoint to train on, tensor by tensor.

The checkpoint holds whole weights under global names, so runs of any tensor-parallel layout can start from it
with `train.init_from`. There is no optimizer state in it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm import __version__
from iomm.checkpoint.folder import PRIVATE, CheckpointError, name_of, write_info
from iomm.checkpoint.hf_layout import ADAPTER_PREFIX, GENERATOR_PREFIX, Manifest, read_json, whole_folder
from iomm.checkpoint.hf_run import compare
from iomm.checkpoint.name_table import Table
from iomm.checkpoint.names import family_table, our_config
from iomm.checkpoint.streaming import Get, SafetensorsReader, Spec, total_bytes, write_sharded
from iomm.conditioning.conditioner import Conditioner
from iomm.config import Config, GeneratorConfig, MllmConfig
from iomm.model.init import initialize


@dataclass(frozen=True)
class Imported:
    """What `import_folder` has made."""

    checkpoint: Path
    notes: tuple[str, ...]  # what the user should know, a sentence each


def import_folder(
    folder: Path, out_run: Path, *, config: Config | None = None, seed: int | None = None
) -> Imported:
    """Make a checkpoint of an exported folder, of FLUX.1 or of Z-Image.

    Args:
        folder: a pipeline's folder with `transformer/` in it, or a transformer's folder.
        out_run: a new run's folder; `--set train.init_from=out_run` starts from it. It appears when it is
            complete, or not at all.
        config: the run to train with it; None: the one that the folder was exported from. A folder of others
            has none, so there it is needed.
        seed: of weights that the folder does not have; None: the configuration's.
    Raises:
        CheckpointError: no such folder, weights as a pickle, tensors that are missing, too many or of the
            wrong shape (all are listed), a configuration for another generator, or `out_run` exists.
    """
    manifest = Manifest.read(folder)
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    generator = our_config(read_json(transformer / "config.json"))
    notes: list[str] = []
    if config is None:
        config = _own_config(manifest, folder, notes)
    _check_generator(folder, generator, config)
    table, reader = family_table(generator), SafetensorsReader(transformer)
    problems = compare("transformer", {n: s.shape for n, s in reader.specs.items()}, table.theirs)
    adapter, adapter_get, adapter_problems = _adapter(folder, config, seed, notes)
    if problems or adapter_problems:
        raise CheckpointError("\n".join([f"{folder} cannot be imported:", *problems, *adapter_problems]))
    for name in table.constants:
        table.check_constant(name, reader.get(name))
    specs = {
        f"model.{GENERATOR_PREFIX}{name}": Spec(shape, reader.specs[table.needs_theirs(name)[0]].dtype)
        for name, shape in table.ours.items()
    } | {f"model.{ADAPTER_PREFIX}{name}": spec for name, spec in adapter.items()}
    get = _getter(table, reader.get, adapter_get)
    step = 0 if manifest is None else manifest.step
    info = {
        "step": step,
        "config": config.to_dict(),
        "extra": {
            "imported": {"from": folder.name, "manifest": None if manifest is None else asdict(manifest)}
        },
        "has_ema": False,
        "iomm_version": __version__,
    }
    with whole_folder(out_run, total_bytes(specs.values())) as new:
        checkpoint = new / "checkpoints" / name_of(step)
        new.chmod(PRIVATE)
        checkpoint.mkdir(parents=True)
        write_sharded(checkpoint, specs, get)
        write_info(checkpoint, info)
    return Imported(out_run / "checkpoints" / name_of(step), tuple(notes))


def _getter(table: Table, theirs: Get, adapter: Get) -> Get:
    def get(name: str) -> Tensor:
        name = name.removeprefix("model.")
        if name.startswith(ADAPTER_PREFIX):
            return adapter(name.removeprefix(ADAPTER_PREFIX))
        return table.to_ours(name.removeprefix(GENERATOR_PREFIX), theirs)

    return get


def _own_config(manifest: Manifest | None, folder: Path, notes: list[str]) -> Config:
    """The configuration in the folder; frozen models that are not where it says are taken from the folder."""
    if manifest is None:
        raise CheckpointError(
            f"{folder} was not exported by iomm, so it does not say with which MLLM, autoencoder and data to "
            "train. Name a configuration: --config CONFIG.py."
        )
    config = Config.from_dict(manifest.config)
    for name, subfolder in (("mllm", "text_encoder"), ("codec", "vae")):
        part, here = getattr(config, name), folder.absolute() / subfolder
        lies_elsewhere = Path(part.path).is_absolute() or part.path.count("/") > 1
        if lies_elsewhere and not Path(part.path).is_dir() and (here / "config.json").is_file():
            notes.append(f"{name}.path: {part.path} is not on this machine, so it is {here} now.")
            changed = dataclasses.replace(part, path=str(here))
            config = dataclasses.replace(config, **{name: changed})
    return config


def _check_generator(folder: Path, generator: GeneratorConfig, config: Config) -> None:
    """All settings of the generator in which a configuration differs from a folder."""
    own, found = asdict(config.generator), asdict(generator)
    differing = {key: value for key, value in found.items() if own[key] != value}
    if differing:
        lines = [f"  {key} is {own[key]}, in the folder {value}" for key, value in differing.items()]
        raise CheckpointError(
            "\n".join([f"the configuration's generator is not the one in {folder}:", *lines])
            + "\nSet these in the configuration (generator=GeneratorConfig(...))."
        )


def _adapter(
    folder: Path, config: Config, seed: int | None, notes: list[str]
) -> tuple[dict[str, Spec], Get, list[str]]:
    """Adapter and connector: of the folder, or fresh ones."""
    source = folder / "query_adapter"
    if not source.is_dir():
        seed = config.train.seed if seed is None else seed
        width = mllm_width(config.mllm)
        fresh = _conditioner(config, width, torch.device("cpu"))
        initialize(nn.ModuleDict({ADAPTER_PREFIX[:-1]: fresh}), seed)
        state: Mapping[str, Tensor] = fresh.state_dict()
        count = sum(t.numel() for t in state.values())
        notes.append(
            f"the folder has no query adapter: its {count:,} parameters (adapter, connector) start from "
            f"random weights of seed {seed}."
        )
        return {n: Spec(tuple(t.shape), t.dtype) for n, t in state.items()}, state.__getitem__, []
    reader = SafetensorsReader(source)
    width = read_json(source / "config.json").get("width")
    if not isinstance(width, int):
        raise CheckpointError(f"{source / 'config.json'} names no width. Export the folder again.")
    wanted = _conditioner(config, width, torch.device("meta")).state_dict()
    problems = compare(
        "query_adapter",
        {n: s.shape for n, s in reader.specs.items()},
        {n: tuple(t.shape) for n, t in wanted.items()},
    )
    return reader.specs, reader.get, problems


def _conditioner(config: Config, width: int, device: torch.device) -> Conditioner:
    with device:
        return Conditioner(config.condition, width, config.generator.condition_width)


def mllm_width(config: MllmConfig) -> int:
    """Channels of an MLLM, from its config.json alone."""
    from transformers import AutoConfig

    path = Path(config.path)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no MLLM at {path}: {path / 'config.json'} is missing. A fresh query adapter "
            "is as wide as the MLLM, so its folder is needed; set mllm.path to one."
        )
    settings: Any = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    return settings.get_text_config().hidden_size
