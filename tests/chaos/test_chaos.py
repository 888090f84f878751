"""A run that is killed again and again is the run that nobody disturbed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.plan import TIMED, Fault, make_plan, read_plan, write_plan

ROOT = Path(__file__).parents[2]


def test_a_plan_follows_from_its_seed_in_the_order_of_steps_and_survives_a_file(tmp_path):
    plan = make_plan(1, 100, 120, hangs=3, ghosts=2)
    assert plan == make_plan(1, 100, 120, hangs=3, ghosts=2) != make_plan(2, 100, 120, hangs=3, ghosts=2)
    assert [fault.step for fault in plan] == sorted(fault.step for fault in plan)
    assert all(1 <= fault.step < 120 for fault in plan)
    write_plan(tmp_path / "plan", plan)
    assert read_plan(tmp_path / "plan") == plan


def test_kills_strike_both_ranks_saves_and_every_other_phase():
    kills = [fault for fault in make_plan(0, 100, 120) if fault.kind == "kill"]
    assert len(kills) == 100
    assert {fault.rank for fault in kills} == {0, 1}
    assert {fault.phase for fault in kills} == {*TIMED, "save"}
    assert 30 <= sum(fault.phase == "save" for fault in kills) <= 50


def test_a_fault_says_what_it_does():
    fault = Fault(kind="kill", rank=1, step=6, phase="save", moment=0.5)
    assert str(fault) == "kill rank 1 from step 6 on in save, before file operation 2"


@pytest.mark.multi
@pytest.mark.timeout(900)  # on a busy machine every launch takes its time
@pytest.mark.slow
def test_ten_kills_a_hang_and_a_ghost_leave_no_trace_in_curve_and_weights(tmp_path):
    counts = ("--kills", "10", "--hangs", "1", "--ghosts", "1", "--steps", "24", "--seed", "5")
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.chaos", *counts, "--folder", str(tmp_path / "chaos")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kill': 10" in done.stdout and "'hang': 1" in done.stdout and "'ghost': 1" in done.stdout
    assert done.stdout.endswith("loss curve and last checkpoint are the same, bit for bit\n")
    logs = [(tmp_path / f"chaos/runs/troubled/logs/rank_0000{rank}.log").read_text() for rank in (0, 1)]
    hung = [re.search(r"== .*made no progress for \d+ s .* phase \w+.*", log) for log in logs]
    assert all(hung) and all("-- thread MainThread" in log for log in logs)
    # Who waits for the rank that hangs says in which collective.
    assert any(" called by " in match[0] for match in hung if match)
    assert any("Superseded" in log for log in logs)
    assert any("ends by RankLost: rank 0 lost another rank in step " in log for log in logs)
    metrics = (tmp_path / "chaos/runs/troubled/metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["phases_ms"] for line in metrics if line.startswith('{"kind": "phases"')]
    assert times and all(len(by_rank) == 2 for phases in times for by_rank in phases.values())
