"""Every kind of input, and the input of a number."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.data.fuzz import cases, images, live_cases, tar_cases
from tests.data.fuzz.cases import Case, Draft

# The damage that images meet most in real life comes up more often.
KINDS: dict[str, Callable[[Draft], Case]] = {
    **{f"image: {damage}": cases.damaged_image(damage) for damage in images.DAMAGE},
    "image: sound variant": cases.variant,
    "image: another format": cases.stranger,
    "image: asks for much": cases.heavy,
    "image: wrong extension": cases.wrong_extension,
    "caption": cases.caption,
    "folder": cases.folder,
    "parquet": cases.parquet,
    "tar: damaged": tar_cases.damaged,
    "tar: size in a header": tar_cases.size_field,
    "tar: checksum": tar_cases.checksum,
    "tar: name": tar_cases.name,
    "tar: type of member": tar_cases.type_,
    "tar: nested": tar_cases.nested,
    "tar: duplicates": tar_cases.duplicates,
    "tar: members missing": tar_cases.missing,
    "tar: extended headers": tar_cases.extended,
    "tar: not a tar": tar_cases.packed,
    "tar: end": tar_cases.end,
    "shard's file name": live_cases.shard_name,
    "index: damaged": live_cases.damaged_index,
    "index: lies": live_cases.lying_index,
    "index: of two shards": live_cases.merged_index,
    "stopped make": live_cases.stopped_make,
    "changes while read": live_cases.changing,
}
_TURNS = [
    *KINDS,
    *[kind for kind in KINDS if kind.startswith("image: ")],
    "tar: damaged",
    "changes while read",
]


def kind_of(number: int) -> str:
    """The kind of an input: they take turns."""
    return _TURNS[number % len(_TURNS)]


def build(seed: int, number: int, folder: Path) -> Case:
    """Write an input; the same for the same seed and number, on any machine with the same libraries."""
    rng = random.Random(f"{seed}: {number}")
    case = KINDS[kind_of(number)](Draft(rng, folder))
    data = {"crop": rng.choice(("center", "random")), "flip": rng.random() < 0.5}
    return replace(case, data=data, buckets=rng.random() < 0.3)
