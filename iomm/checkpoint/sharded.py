"""Resume and open checkpoints: weights, EMA, optimizer and the loop's own data, sharded over ranks
(Megatron's torch_dist format). `saver` writes them.

Everything is stored by the name of the weight it belongs to, whole; which rank held which part when it was
saved is forgotten. So a checkpoint may be loaded with another layout than it was saved with. Whatever can be
wrong with one shows before anything is touched, and all ranks raise together.

Trust: nothing in a checkpoint is run. Tensors are read with `weights_only`; the table of contents and what is
no tensor, which torch would unpickle, `contents` reads as data.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm.checkpoint.contents import ContentsReader
from iomm.checkpoint.folder import (
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    check_architecture,
    check_files,
    check_names,
    find,
    latest,
    read_info,
    unanswered,
)
from iomm.checkpoint.ranks import on_every_rank, on_rank_0, quiet
from iomm.checkpoint.saver import Saver, save
from iomm.checkpoint.streaming import ShardedReader
from iomm.config import Config
from iomm.parallel import cpu
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh
from iomm.parallel.weights import named_weights, sharded

cpu.prepare()  # before the first import of Megatron

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import serialization  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as strategy  # noqa: E402

# Where Megatron opens a checkpoint: with torch's reader, which would unpickle what it finds.
for _module in (serialization, strategy):
    assert callable(vars(_module)["_get_filesystem_reader"])
    vars(_module)["_get_filesystem_reader"] = lambda folder, *_, **__: ContentsReader(folder)

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "Saver",
    "find",
    "latest",
    "load",
    "load_weights",
    "read_info",
    "save",
]


def load(path: Path, engine: Engine, config: Config, mesh: Mesh) -> CheckpointInfo:
    """Put an engine back to where it was when it saved `path`; all ranks call. The layout may be another one.

    Nothing is touched before the checkpoint has proved to be complete, of the same architecture, and to hold
    everything that this run keeps.

    Raises:
        CheckpointError: damaged, of another architecture, or saved with other settings that decide what is
            stored.
    """
    info = _open(path, mesh)
    check_architecture(info, config)
    _check_settings(info, engine, config)
    state = engine.sharded_state()
    state.pop("fp8", None)
    with quiet():
        on_every_rank(mesh, lambda: _check_state(path, state))
        loaded = _read(path, state, mesh)
        engine.load_sharded_state(loaded | {"fp8": _read_fp8(path, engine.module)})
    return info


def load_weights(
    path: Path, module: nn.Module, *, ema: bool, mesh: Mesh, config: Config | None = None
) -> CheckpointInfo:
    """Fill a module with the weights of a checkpoint, in the module's own dtype; all ranks call. No optimizer
    is needed.

    Args:
        path: one checkpoint.
        module: of the architecture that was saved, or this rank's part of it; any layout.
        ema: the averaged weights instead of the last ones.
        mesh: where this rank stands.
        config: if given, its architecture is compared first, setting by setting.

    Raises:
        CheckpointError: damaged, of another architecture, or without EMA when `ema` is asked for.
    """
    info = _open(path, mesh)
    if config is not None:
        check_architecture(info, config)
    if ema and not info.has_ema:
        raise CheckpointError(
            f"checkpoint {path} has no EMA (optimizer.ema_decay was null). Use the last weights with --raw."
        )
    weights = named_weights(module)
    with quiet():
        state = on_every_rank(mesh, lambda: _targets(path, module, mesh, ema=ema))
        loaded = _read(path, dict(state), mesh)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(loaded[name])
    return info


def _open(path: Path, mesh: Mesh) -> CheckpointInfo:
    """The plain data of a checkpoint whose files are all there: as rank 0 sees them whole, and as every rank
    sees them by name, since a node may see another disk."""

    def read() -> CheckpointInfo:
        info = read_info(path)
        check_files(info)
        return info

    info = on_rank_0(mesh, read)
    on_every_rank(mesh, lambda: check_names(info))
    return info


def _read(path: Path, state: dict[str, Any], mesh: Mesh) -> Any:
    """Fill a sharded state dict; all ranks call.

    Raises:
        CheckpointError: a file that the disk does not give now.
        DamagedCheckpoint: a file that is gone, or holds something else.
    """
    # What Megatron reads before its ranks talk to each other: a rank that failed there would miss the talk.
    on_every_rank(mesh, lambda: _readable(path, lambda: serialization.load_common_state_dict(str(path))))
    return on_every_rank(mesh, lambda: _readable(path, lambda: dist_checkpointing.load(state, str(path))))


def _readable[T](path: Path, action: Callable[[], T]) -> T:
    """Do what reads a checkpoint; an error says that it is damaged, unless the machine is at fault."""
    try:
        with quiet():
            return action()
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        if "allocate memory" in str(error):  # torch's words for a CPU that has none left
            raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise CheckpointError(unanswered(path, error)) from error
        raise DamagedCheckpoint(
            f"checkpoint {path} cannot be read: {error}. Restore it or use an older checkpoint."
        ) from error


def _targets(path: Path, module: nn.Module, mesh: Mesh, *, ema: bool) -> dict[str, ShardedTensor]:
    """What to read for each weight of a module: its average if that was kept (a frozen weight has none), in
    the type it was stored in."""
    stored: dict[str, Any] = dict(dist_checkpointing.load_tensors_metadata(str(path)))
    weights = named_weights(module)
    state: dict[str, ShardedTensor] = {}
    for name, weight in weights.items():
        prefix = "ema." if ema and f"ema.{name}" in stored else "model."
        source = stored.get(prefix + name)
        target = torch.empty_like(weight, dtype=source.dtype if source else None, requires_grad=False)
        state |= sharded({name: target}, weights, prefix, mesh)
    _check_tensors(path, dict(state), stored)
    return state


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that misses something of an engine's state."""
    stored: dict[str, Any] = dict(load_sharded_metadata(str(path)))
    _check_tensors(path, state, stored)
    for entry in nested_values(state):
        if isinstance(entry, ShardedObject) and entry.unique_key not in stored:
            raise CheckpointError(_missing(path, entry.key))


def _read_fp8(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """The FP8 scales that a checkpoint has for layers of this module, whatever their history's length. A run
    may turn FP8 on or off: what is missing starts anew."""
    reader, layers = ShardedReader(path), {name for name, _ in module.named_modules()}
    names = [key.removeprefix("fp8.") for key in reader.specs if key.startswith("fp8.")]
    return {name: reader.get(f"fp8.{name}") for name in names if name.rpartition(".")[0] in layers}


def _check_tensors(path: Path, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuse a checkpoint that misses a tensor, or has it in another shape; the message names it."""
    for entry in nested_values(wanted):
        if not isinstance(entry, ShardedTensor):
            continue
        if entry.key not in stored:
            raise CheckpointError(_missing(path, entry.key))
        theirs, ours = tuple(stored[entry.key].global_shape), tuple(entry.global_shape)
        if theirs != ours:
            raise CheckpointError(
                f"{_what(entry.key)} has shape {theirs} in checkpoint {path}, {ours} in this model. "
                "Use the configuration of that checkpoint."
            )


def _missing(path: Path, key: str) -> str:
    if key.startswith("optimizer."):
        return (
            f"checkpoint {path} has no {key}: it was saved with another optimizer, or by an older iomm. Use "
            f"that, or start from the weights alone: --set train.init_from={path}."
        )
    return f"checkpoint {path} has no {_what(key)}. It is of another architecture."


def _what(key: str) -> str:
    """A key of the checkpoint in words."""
    kind, _, name = key.partition(".")
    return {"model": f"weight {name}", "ema": f"average of weight {name}"}.get(kind, key)


def _check_settings(info: CheckpointInfo, engine: Engine, config: Config) -> None:
    """Settings that decide what an optimizer checkpoint contains."""
    if "imported" in info.extra:
        raise CheckpointError(
            f"checkpoint {info.path} was imported: it holds weights and no optimizer, so a run cannot go on "
            f"from it. Start another run from it: --set name=... --set train.init_from={info.path}."
        )
    saved, own = info.config["train"]["precision"], config.train.precision
    if saved != own:
        raise CheckpointError(
            f"checkpoint {info.path} was saved with train.precision = {saved}, this run has {own}. Set it to "
            f"{saved}, or start from the weights alone: --set train.init_from={info.path}."
        )
    if engine.ema is not None and not info.has_ema:
        raise CheckpointError(
            f"checkpoint {info.path} has no EMA, this run keeps one. Set optimizer.ema_decay=null, "
            f"or start from the weights alone: --set train.init_from={info.path}."
        )
