"""Kill a run again and again, and see that it does not matter.

    make chaos                                      100 kills of random ranks at random moments
    make chaos ARGS="--kills 10 --seed 7"           another, shorter one
    make chaos ARGS="--launcher torchrun --kills 10"    restarts by torchrun's elastic agent
    make chaos ARGS="--slurm --kills 10"                the same on two nodes of a real SLURM, on loopback

Trains the shrunken tiny configuration on two processes, once undisturbed and once with faults, and
compares: loss curve, held-out losses, and every tensor of the last checkpoint (weights, average, optimizer)
bit for bit. The plan of faults follows from the seed. The processes are forked from one that has everything
imported, which saves six seconds a start; what they do and how they die is the same.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", GLOO_SOCKET_IFNAME="lo")

from iomm.config import Config  # noqa: E402
from tests.chaos.compare import compare, summary  # noqa: E402
from tests.chaos.launchers import RANKS, fork_launch, say, slurm_launch, torchrun_launch  # noqa: E402
from tests.chaos.plan import make_plan  # noqa: E402
from tests.chaos.worker import happened  # noqa: E402
from tests.small_run import build_world, small_config  # noqa: E402

LAUNCHERS = {"fork": fork_launch, "torchrun": torchrun_launch, "slurm": slurm_launch}


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--hangs", type=int, default=2, help="ranks that stop for ever (default 2)")
    parser.add_argument("--ghosts", type=int, default=2, help="launches that outlive themselves (default 2)")
    parser.add_argument("--steps", type=int, default=120, help="of the run (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="fork")
    parser.add_argument("--slurm", dest="launcher", action="store_const", const="slurm")
    parser.add_argument("--folder", type=Path, help="kept afterwards (default: a temporary one, removed)")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return chaos(arguments, arguments.folder)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return chaos(arguments, Path(folder))


def chaos(arguments: argparse.Namespace, folder: Path) -> int:
    """Both runs and the comparison; the exit status."""
    began = time.monotonic()
    # An agent ends all ranks before it starts others, so it leaves no ghost.
    ghosts = arguments.ghosts if arguments.launcher == "fork" else 0
    others = {"hangs": arguments.hangs, "ghosts": ghosts}
    plan = make_plan(arguments.seed, arguments.kills, arguments.steps, ranks=RANKS, **others)
    (folder / "world").mkdir(parents=True)
    world = build_world(folder / "world")
    names = ("straight", "troubled")
    straight, troubled = (run_config(world, folder, name, arguments.steps) for name in names)
    say(f"seed {arguments.seed}: {len(plan)} faults in {arguments.steps} steps, {arguments.launcher}")
    straight = straight.override(["train.hang_timeout_s=0"])  # however slow the machine is
    fork_launch(straight, [], folder / "straight_launch")
    say(f"undisturbed run done after {time.monotonic() - began:.0f} s")
    launches = LAUNCHERS[arguments.launcher](troubled, plan, folder / "troubled_launch")
    records = happened(folder / "troubled_launch")
    differences = compare(straight.run_dir, troubled.run_dir)
    if len(records) != len(plan):
        differences.append(f"{len(records)} of {len(plan)} faults happened")
    say(summary(plan, records, launches, troubled.run_dir, time.monotonic() - began))
    for difference in differences:
        say(f"DIFFERENT: {difference}")
    say("FAILED" if differences else "loss curve and last checkpoint are the same, bit for bit")
    return 1 if differences else 0


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


if __name__ == "__main__":
    sys.exit(main())
