"""Inputs in a child process, which may crash, hang or ask for too much memory: the parent says which one."""

import faulthandler
import functools
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.data.fuzz import kinds, trial
from tests.data.fuzz.trial import Verdict

SECONDS = 60.0  # that one input may take; it takes milliseconds, but the machine may be busy
MEMORY_BYTES = 768 << 20  # address space beyond what the process has when it starts
PEAK_BYTES = 256 << 20  # that one input may use: a sound image at the limit needs about half of it
HELD_BYTES = 512 << 20  # that the process may grow by, over all inputs: allocators and DALI keep some


@dataclass(frozen=True)
class Ran:
    """What became of an input."""

    number: int
    what: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0  # of memory, beyond what the process had before
    held_bytes: int = 0  # what it has since it began
    died: str | None = None  # it crashed the process, or hung

    @property
    def grown(self) -> bool:
        """Whether the process has become too large, over all its inputs."""
        return self.held_bytes > HELD_BYTES

    @property
    def problems(self) -> list[str]:
        """Why it is not accounted for; empty if it is."""
        found = [f"{route}: {text}" for route, one in self.verdicts.items() for text in one.problems]
        if self.died is not None:
            found.append(self.died)
        if self.peak_bytes > PEAK_BYTES:
            found.append(f"{self.peak_bytes >> 20} MiB in use, more than {PEAK_BYTES >> 20} MiB")
        if self.grown:
            found.append(f"the process grew by {self.held_bytes >> 20} MiB, more than {HELD_BYTES >> 20} MiB")
        return found


def watch(seed: int, numbers: Iterable[int], decode: str, *, seconds: float = SECONDS) -> Iterator[Ran]:
    """Run inputs one after the other; a process that dies, hangs or grows is replaced.

    Args:
        seed, numbers: of the inputs.
        decode: cpu, or dali (which only the loader is run with).
        seconds: that one input may take.
    """
    child: _Child | None = None
    with tempfile.TemporaryDirectory(prefix="iomm-fuzz-", dir=_memory_folder()) as folder:
        try:
            for number in numbers:
                child = child or _Child(seed, decode, folder)
                ran = child.run(number, seconds)
                if ran.died is not None or ran.grown:
                    child.stop()
                    child = None
                yield ran
        finally:
            if child is not None:
                child.stop()


def _memory_folder() -> str | None:
    """Where writing costs least: thousands of shards are made and synced to disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Child:
    def __init__(self, seed: int, decode: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads would not survive a fork
        self._pipe, theirs = context.Pipe()
        self._errors = Path(folder) / "errors.txt"
        arguments = (theirs, seed, decode, folder, str(self._errors))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is ready: what follows is the time of an input alone

    def run(self, number: int, seconds: float) -> Ran:
        self._pipe.send(number)
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except EOFError:
            self._process.join()
            return Ran(number, died=f"the process died, exit code {self._process.exitcode}: {self._tail()}")
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGABRT)  # faulthandler says where it hangs
        self._process.join(10)
        return Ran(number, died=f"no end after {seconds:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        return self._errors.read_text(errors="replace")[-3000:] if self._errors.exists() else ""

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, seed: int, decode: str, folder: str, errors: str) -> None:
    """The child: inputs by number, until it is killed."""
    said = open(errors, "wb", buffering=0)  # noqa: SIM115 - to the end of the process
    os.dup2(said.fileno(), 2)
    faulthandler.enable(said)
    warnings.simplefilter("ignore")
    _share_decoder(decode)
    for number in range(20):  # imports, caches, and DALI's pipeline: not the inputs' memory
        _run(seed, number, decode, folder, 0)
    base = _status("VmRSS")
    limit = _status("VmSize") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send("ready")
    while True:
        number = pipe.recv()
        os.ftruncate(2, 0)
        pipe.send(_run(seed, number, decode, folder, base))


def _share_decoder(decode: str) -> None:
    """One decoder for all inputs: DALI takes a second to build."""
    from iomm.config import DataConfig
    from iomm.data import loader
    from tests.data.fuzz.images import MAX_PIXELS

    if decode == "dali":
        data = DataConfig(images=(), decode="dali", decode_threads=1, max_image_pixels=MAX_PIXELS)
        loader.open_decoder = functools.partial(lambda made, _: made, loader.open_decoder(data))


def _run(seed: int, number: int, decode: str, folder: str, base: int) -> Ran:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case = kinds.build(seed, number, Path(place))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.monotonic()
        before = _status("VmRSS")
        verdicts = trial.run(case, Path(place), decode)
        seconds = time.monotonic() - start
    peak, held = _status("VmHWM") - before, _status("VmRSS") - base
    return Ran(number, case.what, verdicts, seconds, max(0, peak), max(0, held))


def _status(field_: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field_ + ":"))
