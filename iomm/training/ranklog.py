"""RUN/logs/rank_00003.log: what one rank has to say, in the order of time.

Everything that `iomm` logs, and every event of the run as this rank saw it: metrics.jsonl has those of rank
0 only.
"""

import logging
import os
import platform
import socket
from pathlib import Path
from typing import Self, final

from iomm.checkpoint.folder import private_folder
from iomm.parallel.mesh import Mesh

_FORMAT = "%(asctime)s %(process)d %(levelname)s %(message)s"  # a ghost of an earlier launch may write, too


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of one rank."""
    return run_dir / "logs" / f"rank_{rank:05d}.log"


@final
class RankLog:
    """While entered, the rank's log is written. It is appended to: a launch begins with its process and
    host."""

    def __init__(self, run_dir: Path, mesh: Mesh) -> None:
        self._logger = logging.getLogger("iomm")
        path = log_path(run_dir, mesh.rank)
        private_folder(run_dir)
        path.parent.mkdir(exist_ok=True)
        self._handler = logging.FileHandler(path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(_FORMAT))
        self._level = self._logger.level
        self._hello = (
            f"rank {mesh.rank} of {mesh.world_size} starts: process {os.getpid()} on {socket.gethostname()}, "
            f"{mesh.device}, Python {platform.python_version()}"
        )

    def __enter__(self) -> Self:
        self._logger.addHandler(self._handler)
        self._logger.setLevel(logging.INFO)
        self._logger.info(self._hello)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._logger.info("ends")
        else:
            self._logger.error("ends by %s: %s", kind.__name__, error)
        self._logger.setLevel(self._level)
        self._logger.removeHandler(self._handler)
        self._handler.close()
