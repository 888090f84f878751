"""RUN/logs/rank_00003.log: what one rank has to say, in the order of time.

The run's events as this rank saw them (metrics.jsonl has those of rank 0 only), what `iomm` warns of, and the
stacks of a rank that hung.
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
        path = log_path(run_dir, mesh.rank)
        private_folder(run_dir)
        path.parent.mkdir(exist_ok=True)
        self._handler = logging.FileHandler(path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(_FORMAT))
        self._hello = (
            f"rank {mesh.rank} of {mesh.world_size} starts: process {os.getpid()} on {socket.gethostname()}, "
            f"{mesh.device}, Python {platform.python_version()}"
        )

    def note(self, message: str, level: int = logging.INFO) -> None:
        """A line for this file only, whatever the logging of the process is set to."""
        self._handler.handle(logging.LogRecord("iomm", level, "", 0, message, None, None))

    def __enter__(self) -> Self:
        logging.getLogger("iomm").addHandler(self._handler)
        self.note(self._hello)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.note("ends")
        else:
            self.note(f"ends by {kind.__name__}: {error}", logging.ERROR)
        logging.getLogger("iomm").removeHandler(self._handler)
        self._handler.close()
