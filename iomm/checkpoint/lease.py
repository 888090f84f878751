"""Fencing: who writes into a run's folder. Imports no torch.

When a node is lost, its tasks may live on without anybody knowing: a ghost. The next launch of the run
takes the lease, which is a number of its own in RUN/lease.json, and before the ghost writes anything that
lasts it looks there, finds another number and ends. So the newest launch always wins, and needs nobody's
consent. A launcher that starts the ranks of a superseded launch again does not win: torchrun's restarts keep
the launch's name, and one that has held the lease before may not take it from another launch.

Between a ghost's last look and its rename of a checkpoint there is a gap of milliseconds. What may come
through is a whole checkpoint of the same run; its temporary folder is removed by the new launch, so a torn
one cannot.
"""

import datetime
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any, final

from iomm.files import write_whole

LEASE_FILE = "lease.json"
_REMEMBERED = 50  # launches that held the lease


class Superseded(RuntimeError):
    """Another launch has taken over the run's folder; this one must not write there any more."""


@final
class Lease:
    """One launch's right to write into a run's folder.

    Args:
        run_dir: the run's folder; it exists.
        writes: False on every rank but rank 0: then it holds for ever, because that rank writes nothing that
            a ghost could spoil.
    Raises:
        Superseded: torchrun restarted this launch, and another one holds the lease.
    """

    def __init__(self, run_dir: Path, *, writes: bool) -> None:
        self._path = run_dir / LEASE_FILE
        self._id = uuid.uuid4().hex if writes else None
        if not writes:
            return
        launch, before = _launch(), self._launches()
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        # It held the lease, and then another launch took it.
        if restarted and launch is not None and launch in before[:-1]:
            raise Superseded(_taken(self._path, json.loads(self._path.read_text(encoding="utf-8"))))
        taken = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lease = {
            "id": self._id,
            "launches": [*(name for name in before if name != launch), launch][-_REMEMBERED:],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "taken": taken,
        }
        part = self._path.with_name(f"{LEASE_FILE}.{self._id}.part")  # two launches may start at once
        write_whole(self._path, json.dumps(lease, indent=1) + "\n", part=part)

    def _launches(self) -> list[str | None]:
        """Who has held the lease, the last one last; nobody is known where the file is torn or another
        version's."""
        try:
            return list(json.loads(self._path.read_text(encoding="utf-8"))["launches"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []

    def check(self) -> None:
        """Call before each write that lasts. The file is opened anew, which makes NFS ask its server.

        Raises:
            Superseded: another launch holds the lease, or the file is gone or no lease.
        """
        if self._id is None:
            return
        try:
            holder = json.loads(self._path.read_text(encoding="utf-8"))
            held = holder["id"] == self._id
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise Superseded(
                f"{self._path} is gone or no lease any more ({type(error).__name__}), so it is not known who "
                "may write into this run's folder. Launch the run again: it goes on from its last checkpoint."
            ) from error
        if not held:
            raise Superseded(_taken(self._path, holder))


def _launch() -> str | None:
    """torchrun's name of this launch, the same over its restarts; None without torchrun, or without a name of
    its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def _taken(path: Path, holder: dict[str, Any]) -> str:
    return (
        f"process {holder.get('pid')} on {holder.get('host')} has taken over {path.parent} at "
        f"{holder.get('taken')}; this launch (process {os.getpid()} on {socket.gethostname()}) "
        "writes nothing more. If you did not start it, end that process and launch the run again."
    )
