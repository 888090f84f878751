"""What differs between the run that nobody disturbed and the other."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from iomm.checkpoint.streaming import ShardedReader
from iomm.evaluation.runlog import read_run
from iomm.training.ranklog import log_path
from tests.chaos.launchers import RANKS
from tests.chaos.plan import Fault


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
