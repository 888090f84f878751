"""What saving and loading need of all ranks: an error of one is raised by all, because the others would wait
for it forever."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

from torch.distributed.checkpoint.api import CheckpointException

from iomm.parallel.mesh import Mesh


def on_rank_0[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """Do it on rank 0; its result, or its error, is every rank's."""
    result, error = None, None
    if mesh.rank == 0:
        try:
            result = action()
        except Exception as caught:  # raised below on every rank
            error = caught
    result, error = mesh.broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def on_every_rank[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """Do it on every rank; each has its own result, but the error of the first rank that failed is
    everybody's."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:  # raised below on every rank
        error = caught
    raise_together(mesh, error)
    return result  # type: ignore[return-value]  # None only where `action` returns it


def raise_together(mesh: Mesh, error: Exception | None) -> None:
    """Raise on all ranks if there is an error on any: that of the first rank that has one."""
    for found in mesh.gather_objects(error):
        if found is not None:
            raise found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without notices about Megatron's own ways: that it saves through its older asynchronous code, and that
    every rank reads its part of a checkpoint for itself. And with an error as it was raised: torch wraps it
    for a gathering of ranks, in what is no `Exception`."""
    log = logging.getLogger("megatron.core.dist_checkpointing")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for notice in ("torch.distributed is disabled", "The argument order of load"):
                warnings.filterwarnings("ignore", message=notice, category=UserWarning)
            yield
    except CheckpointException as gathered:
        error, _ = next(iter(gathered.failures.values()))
        raise error from None
    finally:
        log.setLevel(level)
