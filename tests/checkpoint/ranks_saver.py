"""Run on 2 ranks: what goes wrong on one of them is said by both, and nothing is lost.

ranks_saver.py FOLDER
"""

import builtins
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iomm.checkpoint import saver
from iomm.checkpoint.folder import CheckpointError, latest
from iomm.checkpoint.saver import Saver
from iomm.checkpoint.sharded import load
from iomm.config import ParallelConfig
from iomm.parallel import mesh as mesh_module
from tests.checkpoint.small_engine import config, everything, make, train


def raises(message: str, action: Callable[[], Any]) -> None:
    """Every rank has to raise a CheckpointError with this in its message."""
    try:
        action()
    except CheckpointError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error with {message!r}")


def main() -> None:
    mesh = mesh_module.start(ParallelConfig())
    folder, last = Path(sys.argv[1]), mesh.rank == mesh.world_size - 1
    engine = make(config(), mesh)
    train(engine, 0, 1)
    background = Saver(folder, 2, mesh, background=True)
    background.save(1, engine, config(), {})
    good = background.finish()
    assert good is not None and good == latest(folder)

    def on_full_disk(file: Any, mode: str = "r", *args: Any) -> Any:
        return builtins.open("/dev/full" if str(file).endswith(".distcp") else file, mode, *args)

    if last:
        saver.filesystem_async.open = on_full_disk  # type: ignore[attr-defined]
    background.save(2, engine, config(), {})
    raises("is full: a checkpoint needs", background.finish)
    if last:
        del saver.filesystem_async.open  # type: ignore[attr-defined]
    mesh.barrier()
    assert [p.name for p in folder.iterdir()] == [good.name]

    listdir = os.listdir
    if last:
        os.listdir = lambda path=".": [name for name in listdir(path) if name != "__1_0.distcp"]
    before = everything(engine)
    raises("does not see __1_0.distcp of", lambda: load(good, engine, config(), mesh))
    os.listdir = listdir
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(engine).items())

    background.save(3, engine, config(), {})
    path = None
    while path is None:
        path = background.poll()
    assert path == latest(folder)
    load(path, make(config(), mesh, seed=1), config(), mesh)
    mesh.barrier()
    mesh_module.stop()


if __name__ == "__main__":
    main()
