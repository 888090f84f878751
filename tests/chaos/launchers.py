"""Ways to launch the ranks of a run until it is done: forked from this process, by torchrun, on a SLURM of
two nodes. Each returns how many launches it took, and says what happened to them."""

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iomm.checkpoint.lease import LEASE_FILE
from iomm.config import Config
from iomm.training.watchdog import HUNG_EXIT
from tests.chaos.plan import Fault, write_plan
from tests.chaos.worker import happened, work
from tests.slurm.cluster import Cluster, free_ports, why_not

RANKS = 2
# The survivors of a fault notice that a rank is gone, unless they still wait for it to come: then it is for
# the agent to ask them to end, as torchrun does.
PATIENCE_S = 5.0
GRACE_S = 40.0  # by then nobody may be left
ROOT = Path(__file__).parents[2]
_DIE_WITH_PARENT = 1  # Linux' PR_SET_PDEATHSIG


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def torchrun_launch(config: Config, plan: Sequence[Fault], folder: Path) -> int:
    """torchrun's elastic agent restarts the ranks, within one job."""
    with (folder.parent / "torchrun.log").open("w") as log:
        command = _torchrun(config, plan, folder, "--standalone", f"--nproc-per-node={RANKS}")
        subprocess.run(command, env=_environment(), stdout=log, stderr=log, check=True)
    return _report(folder)


def slurm_launch(config: Config, plan: Sequence[Fault], folder: Path) -> int:
    """A job on two nodes of a real SLURM, one rank a node, restarted by two agents that meet by c10d.

    Raises:
        RuntimeError: no SLURM can be started here; the message says why.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}", "--rdzv-id=chaos"]
    command = _torchrun(config, plan, folder, f"--nnodes={RANKS}", "--nproc-per-node=1", *meet)
    script = folder / "chaos.sbatch"
    script.write_text(f"#!/bin/bash\nsrun {shlex.join(command)}\n")
    (folder / "slurm").mkdir()
    with Cluster(folder / "slurm", _environment()) as cluster:
        size = (f"--nodes={RANKS}", "--ntasks-per-node=1", "--mem=8000", f"--output={folder / 'job.log'}")
        job = cluster.run("sbatch", "--parsable", *size, str(script))
        ended = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, 60.0 * (2 + len(plan)))
    if ended != "COMPLETED":
        raise AssertionError(f"the job {ended}:\n{(folder / 'job.log').read_text()[-5000:]}")
    return _report(folder)


def _torchrun(config: Config, plan: Sequence[Fault], folder: Path, *layout: str) -> list[str]:
    files = _prepare(config, plan, folder)
    agent = [sys.executable, "-m", "torch.distributed.run", *layout, f"--max-restarts={len(plan)}"]
    return [*agent, str(Path(__file__).with_name("worker.py")), *map(str, files), str(folder)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}


def _prepare(config: Config, plan: Sequence[Fault], folder: Path) -> tuple[Path, Path]:
    """The files of the run and of its faults."""
    folder.mkdir()
    config_file, plan_file = folder / "config.json", folder / "plan.jsonl"
    config_file.write_text(json.dumps(config.to_dict()))
    write_plan(plan_file, plan)
    return config_file, plan_file


def _report(folder: Path) -> int:
    records = happened(folder)
    for number, record in enumerate(records):
        say(f"launch {number}: {record['fault']}{_where(record)}")
    return len(records) + 1


@dataclass
class Ranks:
    """The processes of one launch."""

    pids: list[int]
    status: dict[int, int]  # by rank, of those that ended: exit status, or minus a signal

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.status:
                ended, raw = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.status[rank] = os.waitstatus_to_exitcode(raw)
        return [rank for rank in range(len(self.pids)) if rank not in self.status]

    def send(self, number: signal.Signals) -> None:
        for rank in self.alive():
            os.kill(self.pids[rank], number)


def fork_launch(config: Config, plan: Sequence[Fault], folder: Path) -> int:
    """This process, which has everything imported, forks the ranks and is their agent."""
    files = _prepare(config, plan, folder)
    started: list[Ranks] = []
    ghosts: list[Ranks] = []
    try:
        for launch in range(2 * len(plan) + 2):
            before = len(happened(folder))
            started.append(Ranks([_fork(rank, folder, launch, *files) for rank in _with_port()], {}))
            if not _wait(started[-1], ghosts, config.run_dir, folder, before, plan):
                ghosts.append(started[-1])
            elif not any(started[-1].status.values()):
                _end_ghosts(ghosts)
                return launch + 1
            told = happened(folder)[before:]
            what = told[0]["fault"] + _where(told[0]) if told else "no fault"
            say(f"launch {launch}: {what}; ends {_ends(started[-1])}")
            # That a slow machine looks hung is no fault.
            if not told and HUNG_EXIT not in started[-1].status.values():
                raise AssertionError(f"launch {launch} failed by itself:\n{_last_words(folder, launch)}")
        raise AssertionError("the run does not come to its end")
    finally:
        for ranks in started:
            ranks.send(signal.SIGKILL)


def _where(record: dict[str, Any]) -> str:
    return f" (step {record['at_step']}{', ' + record['at'] if record['at'] else ''})"


def _ends(ranks: Ranks) -> str:
    return ", ".join(f"rank {rank}: {status}" for rank, status in sorted(ranks.status.items())) or "frozen"


def _with_port() -> range:
    """The ranks, with a free port for them to meet at in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(RANKS))
    return range(RANKS)


def _fork(rank: int, folder: Path, launch: int, config_file: Path, plan_file: Path) -> int:
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        log = os.open(_log(folder, launch, rank), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(config_file, plan_file, folder)
    return pid


def _log(folder: Path, launch: int, rank: int) -> Path:
    return folder / f"launch_{launch:03d}_rank_{rank}.log"


def _last_words(folder: Path, launch: int) -> str:
    return "\n".join(_log(folder, launch, rank).read_text()[-3000:] for rank in range(RANKS))


def _wait(
    ranks: Ranks, ghosts: list[Ranks], run_dir: Path, folder: Path, before: int, plan: Sequence[Fault]
) -> bool:
    """Until all ranks have ended, as an agent would: the first failure is the others' end. False: they did
    not end but were frozen."""
    freezes = before < len(plan) and plan[before].kind == "ghost"
    failed_at: float | None = None
    asked = False
    lease = _holder(run_dir)
    while alive := ranks.alive():
        if ghosts and _holder(run_dir) != lease:  # the new launch has taken over
            ghosts[-1].send(signal.SIGCONT)
        if freezes and len(happened(folder)) > before:
            ranks.send(signal.SIGSTOP)
            return False
        if failed_at is None and any(ranks.status.values()):
            failed_at = time.monotonic()
        since = 0.0 if failed_at is None else time.monotonic() - failed_at
        if since > PATIENCE_S and not asked:
            asked = True
            ranks.send(signal.SIGTERM)
        if since > GRACE_S:
            raise AssertionError(f"rank {alive} outlives the others by {GRACE_S:.0f} s")
        time.sleep(0.01)
    return True


def _holder(run_dir: Path) -> str:
    path = run_dir / LEASE_FILE
    return path.read_text() if path.exists() else ""


def _end_ghosts(ghosts: list[Ranks]) -> None:
    """They have to have ended by themselves, and not well."""
    deadline = time.monotonic() + GRACE_S
    for ghost in ghosts:
        while ghost.alive():
            assert time.monotonic() < deadline, "a ghost still runs"
            time.sleep(0.01)
        assert 0 not in ghost.status.values(), f"a ghost ended as if all were well: {ghost.status}"
