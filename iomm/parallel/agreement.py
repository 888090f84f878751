"""Whether the ranks of a run are alike: the same code, versions, settings and kind of device.

A node with another torch or an older checkout trains something else and says nothing; with other collectives
the ranks wait for each other forever. So every rank says what it has before the ranks join, and what differs
is named.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch

import iomm
import iomm_kernels
from iomm.config import Config
from iomm.parallel import mesh
from iomm_kernels import build

PACKAGES = (
    "torch",
    "megatron-core",
    "emerging-optimizers",
    "transformers",
    "diffusers",
    "triton",
    "transformer-engine-torch",
)
# Of a rank, and not compared: ranks differ in these.
OWN = ("host",)
# Different devices in one run are unusual and slow, and may be meant.
ALLOWED = ("device",)

Facts = dict[str, Any]


def facts(config: Config | None) -> Facts:
    """What this rank has, by name: JSON-able values, None for what is not there."""
    on_gpu = torch.cuda.is_available()
    library = build.CUDA if on_gpu else build.CPU
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(local_rank) if on_gpu else f"CPU ({platform.machine()})",
        "collectives": "nccl" if on_gpu else "gloo",
        "code": code_digest(),
        "settings": None if config is None else settings_digest(config),
        "compiled operators": "built" if library.stale() is None else "not built",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "CUDA": torch.version.cuda,
        "NCCL": _nccl() if on_gpu else None,
    }


def require_agreement(config: Config) -> None:
    """All ranks call, before `mesh.start`.

    Raises:
        ValueError: on every rank, if ranks differ in what must be the same; names what, and which ranks.
    """

    def judge(texts: list[str]) -> str:
        ranks = [json.loads(text) for text in texts]
        for note in differences(ranks, ALLOWED):
            logging.getLogger(__name__).warning("the ranks differ in their %s", note)
        return "\n".join(f"  {line}" for line in disagreements(ranks))

    if "RANK" not in os.environ:
        return
    found = mesh.agree(json.dumps(facts(config)), judge)
    if found:
        raise ValueError(
            f"the ranks of this run are not alike:\n{found}\nGive every node the same environment, checkout "
            "and configuration; `iomm doctor --distributed`, launched like the training, shows all ranks."
        )


def differences(ranks: list[Facts], names: tuple[str, ...]) -> list[str]:
    """A line for each of `names` in which ranks differ, with every value and who has it."""
    lines = []
    for name in names:
        holders: dict[Any, list[int]] = {}
        for rank, found in enumerate(ranks):
            holders.setdefault(found.get(name), []).append(rank)
        if len(holders) > 1:
            values = (
                f"{'none' if value is None else value} on {who(ranks, some)}"
                for value, some in holders.items()
            )
            lines.append(f"{name}: {'; '.join(values)}")
    return lines


def disagreements(ranks: list[Facts]) -> list[str]:
    """What no training would start with, a line each."""
    return differences(ranks, _compared(ranks))


def who(ranks: list[Facts], some: list[int]) -> str:
    """Some ranks and where they are: "ranks 8-15 (node2)"."""
    hosts = list(dict.fromkeys(str(ranks[rank]["host"]) for rank in some))
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"rank{'s' if len(some) > 1 else ''} {_spans(some)} ({shown})"


@functools.cache
def code_digest() -> str:
    """Of the source files of iomm and iomm_kernels, wherever they are installed."""
    digest = hashlib.sha256()
    for package in (iomm, iomm_kernels):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def settings_digest(config: Config) -> str:
    """Of every setting of a run."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def _compared(ranks: list[Facts]) -> tuple[str, ...]:
    names = dict.fromkeys(name for found in ranks for name in found)
    return tuple(name for name in names if name not in OWN + ALLOWED)


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _nccl() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
