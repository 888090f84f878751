"""What was found out already, by what it was found out of: a file of lines that a stopped run goes on
with.
"""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from iomm.evaluation.benches.layout import BenchError


class Journal:
    """One JSON line an answer, appended when it is there. Safe to use from threads; one process at a time."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BenchError: a line that is no answer. A torn last line, of a run that was killed, is cut off.
        """
        self._path, self._lock = path, threading.Lock()
        self._found: dict[str, Any] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._found[record["id"]] = record["found"]
            except (ValueError, KeyError, TypeError) as error:
                raise BenchError(
                    f"{path}, line {number} is no kept answer ({error!r}). Remove the file."
                ) from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def get(self, identity: str) -> Any:
        """What was kept; None if nothing."""
        return self._found.get(identity)

    def put(self, identity: str, found: Any) -> None:
        """Keep what was found."""
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps({"id": identity, "found": found}) + "\n")
            self._found[identity] = found


def identity_of(*parts: str | bytes) -> str:
    """Of everything that an answer depends on."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()
