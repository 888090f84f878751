"""Writing checkpoints: while the training waits, or beside it.

All or nothing. Everything goes into a temporary folder; `checkpoint.json` is written last; one rename makes
it a checkpoint. Whatever fails before leaves the older ones as they were, and all ranks raise together; only
where one fails amid Megatron's own messages (its table of contents cannot be written), that rank ends.

    save    plan with all ranks, copy this rank's tensors to host memory                     the step waits
    write   this rank's file, by a thread of its own                                         training goes on
    poll    once a step: has every rank written? then the table of contents, checkpoint.json, the rename

The thread does nothing but write: everything that ranks say to each other, they say in `save`, `poll` and
`finish`, at the same place of the loop, so no message of a checkpoint can meet one of a training step.
"""

import errno
import inspect
import json
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, final

from torch import Tensor

from iomm import __version__
from iomm.checkpoint.folder import (
    TEMPORARY,
    CheckpointError,
    name_of,
    prune,
    publish,
    remove_leftovers,
    write_info,
)
from iomm.checkpoint.lease import Lease, Superseded
from iomm.checkpoint.ranks import on_rank_0, quiet, raise_together
from iomm.config import Config
from iomm.parallel import cpu
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

# Held back on disk while the shards are written, so that the small files after them always fit: were rank 0
# to fail there, the other ranks would wait for it in Megatron. The table of contents grows with the ranks.
_RESERVE, _RESERVE_BYTES = ".reserve", 8 << 20  # at least
_RESERVE_ONE_IN = 1000  # of the bytes of all shards
WAIT_S = 1.0  # between two looks at a writer


class RankOutOfStep(RuntimeError):
    """A save failed on this rank while the others wait for it in Megatron: only an end of all ranks helps."""


@final
class Saver:
    """Saves the checkpoints of a run, one at a time. All ranks make one, and call its methods together.

    Args:
        folder: RUN/checkpoints, seen by all ranks; created by the first save. What runs that died while
            saving left there is removed at once.
        keep_last: how many checkpoints stay.
        mesh: where this rank stands.
        background: write beside the training. It takes host memory of the size of this rank's part of the
            checkpoint.
        lease: what allows this launch to change the folder; without it any launch may.
    """

    def __init__(
        self, folder: Path, keep_last: int, mesh: Mesh, *, background: bool, lease: Lease | None = None
    ) -> None:
        self._folder = folder
        self._keep_last = keep_last
        self._mesh = mesh
        self._background = background
        self._check: Callable[[], None] = lease.check if lease is not None else lambda: None
        self._launch: str = mesh.broadcast_object(uuid.uuid4().hex[:8])
        self._pending: _Save | None = None
        self.on_progress: Callable[[], None] = lambda: None  # told, while all wait for files, that they grow
        on_rank_0(mesh, lambda: remove_leftovers(folder))

    def save(self, step: int, engine: Engine, config: Config, extra: dict[str, Any]) -> Path | None:
        """Save a checkpoint, or begin to: then `finish` must have been called since the last one.

        Args:
            step: optimizer steps done.
            engine: its weights, EMA and optimizer are saved as they are now; they may change afterwards.
            config: stored, and compared when the checkpoint is loaded.
            extra: what the loop wants back, JSON-able: data position, wandb id, ...

        Returns:
            The checkpoint's folder; None if it is written in the background.

        Raises:
            CheckpointError: the disk is full or cannot be written; the older checkpoints are untouched.
            Superseded: another launch has taken over the run.
            TypeError: `extra` holds what JSON cannot.
        """
        assert self._pending is None, "the last checkpoint is still being written: call finish() first"
        json.dumps(extra)  # a value that JSON cannot hold fails here, not when the shards are written
        state = engine.sharded_state()
        info = {
            "step": step,
            "config": config.to_dict(),
            "extra": extra,
            "has_ema": engine.ema is not None,
            "iomm_version": __version__,
        }
        temporary = self._folder / f"{TEMPORARY}{self._launch}_{name_of(step)}"
        needed = sum(self._mesh.gather_objects(_local_bytes(state)))
        pending = _Save(temporary, info, needed, self._mesh, self._check)
        pending.begin(state, copy=self._background)
        self._pending = pending
        pending.start_thread()
        return None if self._background else self.finish()

    def poll(self) -> Path | None:
        """Once a step: make what has been written in the background a checkpoint, if every rank is done.

        Returns:
            The checkpoint's folder, once; None if nothing is being written, or not yet.

        Raises:
            CheckpointError: some rank could not write its part; the older checkpoints are untouched.
            RankOutOfStep: this rank failed where the others wait for it.
            Superseded: another launch has taken over the run.
        """
        if self._pending is None or self._mesh.any_rank(self._pending.busy):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for what is being written and make it a checkpoint.

        Returns, raises: as `poll`.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        self._wait(pending)
        final = pending.complete()
        # The new checkpoint is safe from here on, whatever happens to the old ones.
        on_rank_0(self._mesh, self._prune)
        return final

    def _wait(self, pending: "_Save") -> None:
        """Until every rank has written. No rank waits long in a collective, where NCCL would give up, and as
        long as any file grows that is progress."""
        written = 0
        while self._mesh.any_rank(pending.busy):
            before, written = written, pending.bytes_on_disk()
            if self._mesh.any_rank(written > before):
                self.on_progress()
            pending.join(WAIT_S)

    def _prune(self) -> None:
        self._check()
        prune(self._folder, self._keep_last)


def save(
    folder: Path, step: int, engine: Engine, config: Config, extra: dict[str, Any], keep_last: int, mesh: Mesh
) -> Path:
    """Save one checkpoint while everybody waits; arguments, result and errors as `Saver`'s."""
    path = Saver(folder, keep_last, mesh, background=False).save(step, engine, config, extra)
    assert path is not None
    return path


class _Save:
    """One checkpoint on its way to the disk."""

    def __init__(
        self, temporary: Path, info: dict[str, Any], needed: int, mesh: Mesh, check: Callable[[], None]
    ) -> None:
        self._folder = temporary.parent
        self._temporary = temporary
        self._check = check  # raises where this launch may not change the folder any more
        self._info = info
        self._needed = needed  # bytes of all ranks
        self._mesh = mesh
        self._request: Any = None
        self._buckets: list[Any] = []  # (path, name, (bytes, tensors)) of each of this rank's files
        self._written: dict[int, Any] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: dict[str, Any], *, copy: bool) -> None:
        """Make room, decide who writes what, and take hold of this rank's tensors."""
        try:
            on_rank_0(self._mesh, self._make_room)
        except (OSError, Superseded) as error:
            self._give_up(error)
        # Where Megatron looks for the results. Its own queue belongs to a process that it would start; here
        # the writer is this process. A new one for every save: what a failed one left would be taken for the
        # next one's, whose table of contents would then be wrong.
        filesystem_async._results_queue = queue.Queue()
        with quiet():
            self._request = dist_checkpointing.save(
                state,
                str(self._temporary),
                async_sharded_save=True,
                async_strategy="mcore",
                validate_access_integrity=True,
            )
        if self._request.async_fn is not None:
            self._buckets = self._request.preload_fn()  # copies what lies on a GPU
            if copy:
                originals = self._request.async_fn_args[1]
                self._buckets = [_copied(*pair) for pair in zip(self._buckets, originals, strict=True)]

    def bytes_on_disk(self) -> int:
        """What this rank has written so far."""
        paths = [Path(path) for path, *_ in self._buckets]
        return sum(path.stat().st_size for path in paths if path.exists())

    def join(self, timeout_s: float) -> None:
        """Wait for this rank's writer, but no longer than that."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def start_thread(self) -> None:
        self._thread = threading.Thread(target=self.write, name="checkpoint")
        self._thread.start()

    def write(self) -> None:
        """Write this rank's files, as Megatron's own writer does, but keep the error that it would reduce to
        a string. Raises nothing: `complete` does, on all ranks."""
        if self._request.async_fn is None:
            return
        transforms = self._request.async_fn.args[0]
        # Unwrapped: Megatron's decorator would turn the garbage collector off, for the training as well.
        write_file: Any = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
        try:
            for index, bucket in enumerate(self._buckets):
                _, outcome = write_file(transforms, index, bucket, None, None, use_fsync=True)
                if isinstance(outcome, Exception):
                    raise outcome
                self._written[index] = outcome
        except Exception as error:  # raised in `complete`, on every rank
            self._error = error
        self._buckets = []  # the copies are not needed any more

    def complete(self) -> Path:
        """When every rank is done: the table of contents, `checkpoint.json`, the name."""
        final = self._folder / name_of(self._info["step"])
        try:
            raise_together(self._mesh, self._error)
            if self._written:
                self._request.async_fn_args[2].put(self._written)
            on_rank_0(self._mesh, lambda: (self._temporary / _RESERVE).unlink())
            self._finalize()
            on_rank_0(self._mesh, lambda: write_info(self._temporary, self._info))
            on_rank_0(self._mesh, lambda: self._publish(final))
        except RankOutOfStep:
            raise
        except Exception as error:  # whatever it was, the last checkpoint is as it was
            self._give_up(error)
        return final

    def _finalize(self) -> None:
        """Megatron's own end of a save, in which its ranks talk to each other."""
        try:
            with quiet():
                for finalize in self._request.finalize_fns:
                    finalize()
        except Exception as error:
            if self._mesh.world_size == 1:
                raise
            raise RankOutOfStep(
                f"rank {self._mesh.rank} cannot finish the checkpoint in {self._temporary}, and the other "
                f"ranks wait for it: {type(error).__name__}: {error}. Older checkpoints are untouched; the "
                "launcher starts all ranks again, from the newest."
            ) from error

    def _publish(self, final: Path) -> None:
        self._check()
        publish(self._temporary, final)

    def _make_room(self) -> None:
        self._check()
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        reserve = max(_RESERVE_BYTES, self._needed // _RESERVE_ONE_IN)
        if shutil.disk_usage(self._folder).free < self._needed + reserve:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._temporary.mkdir()
        with open(self._temporary / _RESERVE, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, reserve)

    def _give_up(self, error: Exception) -> NoReturn:
        if self._mesh.rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if isinstance(error, Superseded):
            raise error
        raise explain(error, self._folder, self._needed) from error


def explain(error: Exception, folder: Path, needed: int) -> CheckpointError:
    """What a user can do about a save that failed; `needed` bytes would have been written."""
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return CheckpointError(
            f"cannot save a checkpoint in {folder}: {type(error).__name__}: {error}. "
            "Older checkpoints are untouched."
        )
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return CheckpointError(
        f"the disk of {folder} is full: a checkpoint needs {needed:,} bytes, {free:,} are free. "
        "Delete something there, lower train.keep_last, or set out_dir to another disk. "
        "Older checkpoints are untouched."
    )


def _copied(on_host: Any, original: Any) -> Any:
    """A file's tensors as they are now: what came from a GPU is a copy already, what was on the host is
    not."""
    path, name, (plain, tensors) = on_host
    pairs: list[tuple[tuple[Any, Tensor], tuple[Any, Tensor]]]
    pairs = list(zip(tensors, original[2][1], strict=True))
    return path, name, (plain, [(item, t.clone() if t is there else t) for (item, t), (_, there) in pairs])


def _local_bytes(state: dict[str, Any]) -> int:
    """Bytes this rank will write."""
    tensors = (
        t for t in nested_values(state) if isinstance(t, ShardedTensor) and is_main_replica(t.replica_id)
    )
    return sum(t.data.numel() * t.data.element_size() for t in tensors if t.data is not None)
