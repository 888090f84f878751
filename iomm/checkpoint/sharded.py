"""Save and resume: weights, EMA, optimizer and the loop's own data, sharded over ranks (Megatron's torch_dist
format).

Saving is all or nothing. Everything goes into a temporary folder; `checkpoint.json` is written last; one
rename makes it a checkpoint. Whatever fails before leaves the older ones as they were, and all ranks raise
together.

Trust: the tensors and Megatron's common data are read without unpickling arbitrary objects (`weights_only`).
The exception is `.metadata`, the table of contents of torch's distributed checkpoints, which torch itself
unpickles: load checkpoints of people you trust only, and exchange models as safetensors.
"""

import contextlib
import errno
import json
import logging
import os
import queue
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iomm import __version__
from iomm.checkpoint.folder import (
    TEMPORARY,
    CheckpointError,
    CheckpointInfo,
    check_architecture,
    check_files,
    find,
    latest,
    name_of,
    prune,
    publish,
    read_info,
    remove_leftovers,
    write_info,
)
from iomm.config import Config
from iomm.parallel import cpu
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh
from iomm.parallel.weights import named_weights, sharded

cpu.prepare()  # before the first import of Megatron

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

__all__ = ["CheckpointError", "CheckpointInfo", "find", "latest", "load", "load_weights", "read_info", "save"]

# Held back on disk while the shards are written, so that the small files after them always fit: were rank 0
# to fail there, the other ranks would wait for it in Megatron.
_RESERVE, _RESERVE_BYTES = ".reserve", 8 << 20


def save(
    folder: Path, step: int, engine: Engine, config: Config, extra: dict[str, Any], keep_last: int, mesh: Mesh
) -> Path:
    """Save a checkpoint; all ranks call, with the same arguments.

    Args:
        folder: RUN/checkpoints, seen by all ranks; created if missing.
        step: optimizer steps done.
        engine: its weights, EMA and optimizer are saved.
        config: stored, and compared when the checkpoint is loaded.
        extra: what the loop wants back, JSON-able: data position, wandb id, ...
        keep_last: how many checkpoints stay, this one included.
        mesh: where this rank stands.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or cannot be written; the older checkpoints are untouched.
        TypeError: `extra` holds what JSON cannot.
    """
    json.dumps(extra)  # a value that JSON cannot hold fails here, not when the shards are written
    state = engine.sharded_state(loading=False)
    temporary, final = folder / f"{TEMPORARY}{name_of(step)}", folder / name_of(step)
    needed = sum(mesh.gather_objects(_local_bytes(state)))
    info = {
        "step": step,
        "config": config.to_dict(),
        "extra": extra,
        "has_ema": engine.ema is not None,
        "iomm_version": __version__,
    }
    try:
        _on_rank_0(mesh, lambda: _begin(folder, temporary, needed))
        with _quiet():
            _write_shards(state, temporary, mesh)
        _on_rank_0(mesh, lambda: write_info(temporary, info))
        _on_rank_0(mesh, lambda: publish(temporary, final))
    except OSError as error:
        if mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _explain(error, folder, needed) from error
    # The new checkpoint is safe from here on, whatever happens to the old ones.
    _on_rank_0(mesh, lambda: prune(folder, keep_last))
    return final


def load(path: Path, engine: Engine, config: Config, mesh: Mesh) -> CheckpointInfo:
    """Put an engine back to where it was when it saved `path`; all ranks call.

    Nothing is touched before the checkpoint has proved to be complete and of the same architecture.

    Raises:
        CheckpointError: damaged, of another architecture, or saved with other optimizer settings that decide
            what is stored.
    """
    info = _on_rank_0(mesh, lambda: _read(path))
    check_architecture(info, config)
    _check_state(info, engine, config)
    state = engine.sharded_state(loading=True)
    with _quiet():
        loaded: Any = dist_checkpointing.load(state, str(path))
        engine.load_sharded_state(loaded)
    return info


def load_weights(
    path: Path, module: nn.Module, *, ema: bool, mesh: Mesh, config: Config | None = None
) -> CheckpointInfo:
    """Fill a module with the weights of a checkpoint, in the module's own dtype; all ranks call. No optimizer
    is needed.

    Args:
        path: one checkpoint.
        module: of the architecture that was saved; any tensor-parallel layout.
        ema: the averaged weights instead of the last ones.
        mesh: where this rank stands.
        config: if given, its architecture is compared first, setting by setting.

    Raises:
        CheckpointError: damaged, of another architecture, or without EMA when `ema` is asked for.
    """
    info = _on_rank_0(mesh, lambda: _read(path))
    if config is not None:
        check_architecture(info, config)
    if ema and not info.has_ema:
        raise CheckpointError(
            f"checkpoint {path} has no EMA (optimizer.ema_decay was null). Use the last weights with --raw."
        )
    with _quiet():
        stored: dict[str, Any] = dict(dist_checkpointing.load_tensors_metadata(str(path)))
        weights = named_weights(module)
        prefixes = {n: "ema." if ema and f"ema.{n}" in stored else "model." for n in weights}
        state: dict[str, ShardedTensor] = {}
        for name, weight in weights.items():
            source = stored.get(prefixes[name] + name)
            target = torch.empty_like(weight, dtype=source.dtype if source else None, requires_grad=False)
            state |= sharded({name: target}, weights, prefixes[name], mesh)
            _check_shape(path, name, source, state[name])
        loaded: Any = dist_checkpointing.load(dict(state), str(path))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(loaded[name])
    return info


def _begin(folder: Path, temporary: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if free < needed + _RESERVE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary.mkdir()
    with open(temporary / _RESERVE, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)


def _write_shards(state: dict[str, Any], temporary: Path, mesh: Mesh) -> None:
    """Every rank writes its part. Raises OSError on all ranks if one of them could not."""
    if filesystem_async._results_queue is None:
        # Where the writer leaves its results. Megatron's own queue belongs to a process that it starts for
        # asynchronous saves; here the writer runs in this thread.
        filesystem_async._results_queue = queue.Queue()
    request: Any = dist_checkpointing.save(
        state, str(temporary), async_sharded_save=True, async_strategy="mcore", validate_access_integrity=True
    )
    written, error = _run_writer(request)
    errors = [e for e in mesh.gather_objects(error) if e is not None]
    if errors:
        raise errors[0]
    if written:
        request.async_fn_args[2].put(written)
    _on_rank_0(mesh, lambda: (temporary / _RESERVE).unlink())
    for finalize in request.finalize_fns:
        finalize()


def _run_writer(request: Any) -> tuple[dict[int, Any], OSError | None]:
    """Write this rank's files, as Megatron's own writer does, but keep the error that it would reduce to a
    string."""
    if request.async_fn is None:
        return {}, None
    transforms = request.async_fn.args[0]
    written = {}
    for index, bucket in enumerate(request.preload_fn()):
        outcome: Any = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, None, None, use_fsync=True
        )
        if isinstance(outcome[1], OSError):
            return {}, outcome[1]
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        written[index] = outcome[1]
    return written, None


def _on_rank_0[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """Do it on rank 0; its result, or its error, is every rank's."""
    result, error = None, None
    if mesh.rank == 0:
        try:
            result = action()
        except Exception as caught:  # raised below on every rank: the others would wait forever
            error = caught
    result, error = mesh.broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def _read(path: Path) -> CheckpointInfo:
    info = read_info(path)
    check_files(info)
    return info


def _explain(error: OSError, folder: Path, needed: int) -> CheckpointError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"cannot save a checkpoint in {folder}: {error}. Older checkpoints are untouched."
        )
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return CheckpointError(
        f"the disk of {folder} is full: a checkpoint needs {needed:,} bytes, {free:,} are free. "
        "Delete something there, lower train.keep_last, or set out_dir to another disk. "
        "Older checkpoints are untouched."
    )


def _local_bytes(state: dict[str, Any]) -> int:
    """Bytes this rank will write."""
    tensors = (
        t for t in nested_values(state) if isinstance(t, ShardedTensor) and is_main_replica(t.replica_id)
    )
    return sum(t.data.numel() * t.data.element_size() for t in tensors if t.data is not None)


def _check_state(info: CheckpointInfo, engine: Engine, config: Config) -> None:
    """Settings that decide what an optimizer checkpoint contains."""
    if "imported" in info.extra:
        raise CheckpointError(
            f"checkpoint {info.path} was imported: it holds weights and no optimizer, so a run cannot go on "
            f"from it. Start another run from it: --set name=... --set train.init_from={info.path}."
        )
    ours = config.to_dict()
    for section, key in (("train", "precision"), ("parallel", "distributed_optimizer")):
        saved, own = info.config[section][key], ours[section][key]
        if saved != own:
            raise CheckpointError(
                f"checkpoint {info.path} was saved with {section}.{key} = {saved}, this run has "
                f"{own}. Set it to {saved}, or start from the weights alone: "
                f"--set train.init_from={info.path}."
            )
    if engine.ema is not None and not info.has_ema:
        raise CheckpointError(
            f"checkpoint {info.path} has no EMA, this run keeps one. Set optimizer.ema_decay=null, "
            f"or start from the weights alone: --set train.init_from={info.path}."
        )


def _check_shape(path: Path, name: str, stored: ShardedTensor | None, wanted: ShardedTensor) -> None:
    if stored is None:
        raise CheckpointError(f"checkpoint {path} has no weight {name}. It is of another architecture.")
    if tuple(stored.global_shape) != tuple(wanted.global_shape):
        raise CheckpointError(
            f"weight {name} has shape {tuple(stored.global_shape)} in checkpoint {path}, "
            f"{tuple(wanted.global_shape)} in this model. Use the configuration of that checkpoint."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without notices about Megatron's own ways: that it saves through its older asynchronous code, and that
    every rank reads its part of a checkpoint for itself."""
    log = logging.getLogger("megatron.core.dist_checkpointing")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for notice in ("torch.distributed is disabled", "The argument order of load"):
                warnings.filterwarnings("ignore", message=notice, category=UserWarning)
            yield
    finally:
        log.setLevel(level)
