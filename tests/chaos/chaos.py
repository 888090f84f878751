"""Kill a run again and again, and see that it does not matter.

    make chaos                                      100 kills of random ranks at random moments
    make chaos ARGS="--kills 10 --seed 7"           another, shorter one
    make chaos ARGS="--launcher torchrun"           restarts by torchrun's elastic agent

Trains the shrunken tiny configuration on two processes, once undisturbed and once with faults, and
compares: loss curve, held-out losses, and every tensor of the last checkpoint (weights, average, optimizer)
bit for bit. The plan of faults follows from the seed. The processes are forked from one that has everything
imported, which saves six seconds a start; what they do and how they die is the same.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", GLOO_SOCKET_IFNAME="lo")

import torch  # noqa: E402

from iomm.checkpoint.lease import LEASE_FILE  # noqa: E402
from iomm.checkpoint.streaming import ShardedReader  # noqa: E402
from iomm.config import Config  # noqa: E402
from iomm.evaluation.runlog import read_run  # noqa: E402
from iomm.training.ranklog import log_path  # noqa: E402
from iomm.training.watchdog import HUNG_EXIT  # noqa: E402
from tests.chaos.plan import Fault, make_plan, write_plan  # noqa: E402
from tests.chaos.worker import happened, work  # noqa: E402
from tests.small_run import build_world, small_config  # noqa: E402

RANKS = 2
GRACE_S = 40.0  # for the survivors of a fault to end by themselves
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--hangs", type=int, default=2, help="ranks that stop for ever (default 2)")
    parser.add_argument("--ghosts", type=int, default=2, help="launches that outlive themselves (default 2)")
    parser.add_argument("--steps", type=int, default=120, help="of the run (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=["fork", "torchrun"], default="fork")
    parser.add_argument("--folder", type=Path, help="kept afterwards (default: a temporary one, removed)")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return chaos(arguments, arguments.folder)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return chaos(arguments, Path(folder))


def chaos(arguments: argparse.Namespace, folder: Path) -> int:
    """Both runs and the comparison; the exit status."""
    began = time.monotonic()
    by_agent = arguments.launcher == "torchrun"
    others = {} if by_agent else {"hangs": arguments.hangs, "ghosts": arguments.ghosts}
    plan = make_plan(arguments.seed, arguments.kills, arguments.steps, ranks=RANKS, **others)
    (folder / "world").mkdir(parents=True)
    world = build_world(folder / "world")
    names = ("straight", "troubled")
    straight, troubled = (run_config(world, folder, name, arguments.steps) for name in names)
    say(f"seed {arguments.seed}: {len(plan)} faults in {arguments.steps} steps, {arguments.launcher}")
    fork_launch(straight, [], folder / "straight_launch")
    say(f"undisturbed run done after {time.monotonic() - began:.0f} s")
    launch = torchrun_launch if by_agent else fork_launch
    launches = launch(troubled, plan, folder / "troubled_launch")
    records = happened(folder / "troubled_launch")
    differences = compare(straight.run_dir, troubled.run_dir)
    if len(records) != len(plan):
        differences.append(f"{len(records)} of {len(plan)} faults happened")
    say(summary(plan, records, launches, troubled.run_dir, time.monotonic() - began))
    for difference in differences:
        say(f"DIFFERENT: {difference}")
    say("FAILED" if differences else "loss curve and last checkpoint are the same, bit for bit")
    return 1 if differences else 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run_config(world: Path, folder: Path, name: str, steps: int) -> Config:
    """The shrunken tiny run, saving every third step, evaluating now and then, with a feature cache."""
    settings: dict[str, Any] = {
        "train__steps": steps,
        "train__micro_batch_images": 4,
        "train__save_every_steps": 3,
        "train__keep_last": 2,
        "train__eval_every_steps": 12,
        "train__sample_every_steps": 1000,
        "train__straggler_every_steps": 5,
        "train__hang_timeout_s": 6.0,
        "data__mix_ratio": 0.5,
        "data__cache_dir": str(folder / f"{name}_cache"),
    }
    return small_config(world, folder / "runs", name, **settings)


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


def fork_launch(config: Config, plan: list[Fault], folder: Path) -> int:
    """Launch the run until it is done; the number of launches."""
    folder.mkdir()
    config_file, plan_file = folder / "config.json", folder / "plan.jsonl"
    config_file.write_text(json.dumps(config.to_dict()))
    write_plan(plan_file, plan)
    ghosts: list[Ranks] = []
    for launch in range(2 * len(plan) + 2):
        before = len(happened(folder))
        fault = plan[before] if before < len(plan) else None
        ranks = Ranks([_fork(rank, folder, launch, config_file, plan_file) for rank in _with_port()], {})
        frozen = _wait(ranks, ghosts, config.run_dir, folder, before, fault)
        if frozen:
            ghosts.append(ranks)
        elif all(status == 0 for status in ranks.status.values()):
            _end_ghosts(ghosts)
            return launch + 1
        told = happened(folder)[before:]
        what = told[0]["fault"] + _where(told[0]) if told else "no fault"
        say(f"launch {launch}: {what}; ends {_ends(ranks)}")
        if not told and HUNG_EXIT not in ranks.status.values():  # that a slow machine looks hung is no fault
            raise AssertionError(f"launch {launch} failed by itself:\n{_last_words(folder, launch)}")
    raise AssertionError("the run does not come to its end")


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
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        log = os.open(_log(folder, launch, rank), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = work(config_file, plan_file, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _log(folder: Path, launch: int, rank: int) -> Path:
    return folder / f"launch_{launch:03d}_rank_{rank}.log"


def _last_words(folder: Path, launch: int) -> str:
    return "\n".join(_log(folder, launch, rank).read_text()[-3000:] for rank in range(RANKS))


def _wait(
    ranks: Ranks, ghosts: list[Ranks], run_dir: Path, folder: Path, before: int, fault: Fault | None
) -> bool:
    """Until all ranks have ended, as an agent would: the first failure is the others' end. True: they did not
    end but were frozen."""
    failed_at: float | None = None
    lease = _holder(run_dir)
    while alive := ranks.alive():
        if ghosts and _holder(run_dir) != lease:  # the new launch has taken over
            ghosts[-1].send(signal.SIGCONT)
        if fault is not None and fault.kind == "ghost" and len(happened(folder)) > before:
            ranks.send(signal.SIGSTOP)
            return True
        if failed_at is None and any(ranks.status.values()):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            raise AssertionError(f"rank {alive} outlives the others by {GRACE_S:.0f} s")
        time.sleep(0.01)
    return False


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


def torchrun_launch(config: Config, plan: list[Fault], folder: Path) -> int:
    """The same by torchrun, whose agent restarts the ranks; the number of launches."""
    folder.mkdir()
    config_file, plan_file = folder / "config.json", folder / "plan.jsonl"
    config_file.write_text(json.dumps(config.to_dict()))
    write_plan(plan_file, plan)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [f"--max-restarts={len(plan)}", str(Path(__file__).with_name("worker.py"))]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    with (folder / "torchrun.log").open("w") as log:
        subprocess.run(
            [*command, str(config_file), str(plan_file), str(folder)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=log,
            stderr=log,
            check=True,
        )
    return len(happened(folder)) + 1


def compare(straight: Path, troubled: Path) -> list[str]:
    """What differs between the two runs."""
    one, other = read_run(straight), read_run(troubled)
    out: list[str] = []
    curve = {record["step"]: record["loss"] for record in one.train}
    if curve != {record["step"]: record["loss"] for record in other.train}:
        out.append("loss curve")
    for line in (troubled / "metrics.jsonl").read_text().splitlines():  # steps that were repeated, too
        if line.startswith('{"kind": "train"') and line.endswith("}"):
            record = json.loads(line)
            if record["loss"] != curve[record["step"]]:
                out.append(f"loss of a repeated step {record['step']}")
    if [e["velocity_loss"] for e in one.evals] != [e["velocity_loss"] for e in other.evals]:
        out.append("held-out losses")
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (straight, troubled)]
    if names[0] != names[1]:
        return [*out, f"checkpoints {names}"]
    ours, theirs = (ShardedReader(run / "checkpoints" / names[0][-1]) for run in (straight, troubled))
    if ours.specs != theirs.specs:
        return [*out, "the tensors in the last checkpoint"]
    out += [name for name in ours.specs if not torch.equal(ours.get(name), theirs.get(name))]
    state = json.loads((troubled / "run_state.json").read_text())
    if state["state"] != "done":
        out.append(f"run_state.json: {state}")
    return out


def summary(
    plan: list[Fault], records: list[dict[str, Any]], launches: int, run_dir: Path, seconds: float
) -> str:
    """What happened, in a few lines."""
    struck = plan[: len(records)]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = sum(line.startswith('{"kind": "train"') for line in lines)
    kinds, phases = Counter(fault.kind for fault in struck), Counter(fault.phase for fault in struck)
    logs = [log_path(run_dir, rank).read_text() for rank in range(RANKS)]
    return (
        f"{dict(kinds)} by rank {dict(sorted(Counter(fault.rank for fault in struck).items()))} in "
        f"{dict(phases)}; {launches} launches, {steps} steps computed, "
        f"{sum(log.count('-- thread MainThread') for log in logs)} dumps of stacks, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
