"""`iomm doctor --distributed`: what every rank has, what differs, and whether a sum over all is right.

Launched like the training, for instance `torchrun --nproc-per-node=8 -m iomm.cli doctor --distributed`.
"""

import json
import sys

import torch
import torch.distributed as dist

from iomm.config import Config, ParallelConfig
from iomm.parallel import mesh
from iomm.parallel.agreement import ALLOWED, OWN, Facts, differences, disagreements, facts, who

ALONE = (
    "This is one rank alone. Launch it like the training to compare all of them, for instance:\n"
    "  torchrun --nproc-per-node=8 -m iomm.cli doctor --distributed\n"
)


def run(config: Config | None) -> int:
    """Print the comparison on rank 0. All ranks call.

    Args:
        config: the run to come; None: settings are not compared.
    Returns:
        the exit status: 1 if no training would start.
    """
    ranks: list[Facts] = []  # on rank 0

    def judge(texts: list[str]) -> str:
        ranks.extend(json.loads(text) for text in texts)
        return json.dumps(not disagreements(ranks))

    alike = bool(json.loads(mesh.agree(json.dumps(facts(config)), judge)))
    if ranks:
        sys.stdout.write(render_ranks(ranks))
        sys.stdout.flush()
    if not alike:
        return 1
    right = sum_over_ranks(config)
    if ranks:
        sys.stdout.write(f"\n{right}\n{ALONE if len(ranks) == 1 else ''}")
    return 0


def sum_over_ranks(config: Config | None) -> str:
    """Join the ranks as the training would and add up a one of each. All ranks call.

    Raises:
        RuntimeError: the sum is wrong.
    """
    joined = mesh.start(ParallelConfig() if config is None else config.parallel)
    ones = torch.ones(1, device=joined.device)
    dist.all_reduce(ones)
    if ones.item() != joined.world_size:
        raise RuntimeError(
            f"a sum of ones over {joined.world_size} ranks gave {ones.item():g} on rank {joined.rank}. The "
            "network or its driver loses data: do not train on these nodes."
        )
    return f"a sum over all {joined.world_size} ranks, on {joined.device.type}, is right"


def render_ranks(ranks: list[Facts]) -> str:
    """Plain text: who is where, what all have, what differs."""
    places: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(ranks):
        places.setdefault((found["host"], found["device"]), []).append(rank)
    lines = ["ranks"]
    lines += [f"  {who(ranks, some)}: {device}" for (_, device), some in places.items()]
    shared = [
        f"  {name}: {value}"
        for name, value in ranks[0].items()
        if name not in OWN and value is not None and all(r.get(name) == value for r in ranks)
    ]
    lines += ["", "the same on all ranks", *shared] if len(ranks) > 1 else ["", "it has", *shared]
    if notes := differences(ranks, ALLOWED):
        lines += ["", "different, which may be meant", *(f"  {note}" for note in notes)]
    if found := disagreements(ranks):
        lines += ["", "DIFFERENT: no training starts with these", *(f"  {line}" for line in found)]
    return "\n".join(lines) + "\n"
