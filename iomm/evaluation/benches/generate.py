"""Write a benchmark's folder from a checkpoint, on all ranks there are.

    OUT/                  what the official scorer reads, and nothing else
    OUT.run.json          what it was made with, and every prompt's key; `complete` when nothing is missing
    OUT.part/             a rank's unfinished files, until they are renamed into OUT

Prompts are painted in fixed groups of neighbours, and a picture starts from the noise of (seed, prompt
number * images per prompt + image number). So neither the number of ranks nor an interruption changes a
picture: a group of which a file is missing is painted whole again, and only what is missing is written.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from iomm.evaluation.benches.layout import Bench, BenchError, Item, look, require_exact
from iomm.evaluation.benches.records import read_json
from iomm.evaluation.scores import write_json
from iomm.parallel.mesh import Mesh

# Items and the number of the first picture's noise -> uint8 (items * images per prompt, 3, side, side)
Paint = Callable[[Sequence[Item], int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How pictures are made."""

    side_px: int
    batch_prompts: int  # painted together; the same pictures come only with the same number
    about: Mapping[str, Any]  # checkpoint, prompts, sampler: for the record, and compared when going on

    def __post_init__(self) -> None:
        if self.batch_prompts < 1:
            raise BenchError(f"--batch {self.batch_prompts} must be at least 1 prompt.")


def record_path(folder: Path) -> Path:
    """Where a folder's record lies: beside it, because scorers open whatever is in it."""
    return folder.with_name(folder.name + ".run.json")


def write_folder(
    bench: Bench,
    items: Sequence[Item],
    folder: Path,
    paint: Paint,
    how: Generation,
    mesh: Mesh,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> int:
    """Write what is missing of a benchmark's folder; all ranks call. How many prompts were painted, by all.

    Args:
        items: all of them, in order.
        on_progress: told of this rank's prompts that are done, of how many.
    Raises:
        BenchError: the folder was begun with other settings, holds files that do not belong there, or misses
            some at the end.
        OSError: a file cannot be written.
    """
    groups = _groups(items, how.batch_prompts)
    todo = _by_rank_0(mesh, lambda: _open(bench, items, groups, folder, how))
    mine, done = todo[mesh.rank :: mesh.world_size], 0
    private = _part_folder(folder) / f"{mesh.rank}-{os.getpid()}"
    for number, missing in mine:
        group = groups[number]
        _write_group(
            bench, group, folder, private, paint(group, group[0].number * bench.images_per_prompt), missing
        )
        done += len(group)
        on_progress(done, sum(len(groups[n]) for n, _ in mine))
    mesh.barrier()
    _by_rank_0(mesh, lambda: _close(bench, items, folder, how))
    return sum(len(groups[number]) for number, _ in todo)


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder was made with.

    Raises:
        BenchError: no whole record, or the folder is unfinished.
        OSError: no record.
    """
    path = record_path(folder)
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("items"), dict):
        raise BenchError(f"{path} is no record of `iomm evaluate generate`. Generate into a new folder.")
    if not record.get("complete"):
        raise BenchError(f"{folder} is unfinished, says {path}. Go on with `iomm evaluate generate` first.")
    return record


def to_files(bench: Bench, item: Item, pictures_BCHW: Tensor) -> dict[str, Image.Image]:
    """The picture files of an item, by path: its images one by one, or as one grid, row by row."""
    images = [Image.fromarray(picture) for picture in pictures_BCHW.cpu().permute(0, 2, 3, 1).numpy()]
    if bench.tiles > 1:
        side = images[0].width
        grid = Image.new("RGB", (bench.tiles * side, bench.tiles * side))
        for i, image in enumerate(images):
            grid.paste(image, (i % bench.tiles * side, i // bench.tiles * side))
        images = [grid]
    return dict(zip(bench.pictures(item), images, strict=True))


def _groups(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """At most `size` items a group, whose numbers follow each other: a subset may lack some."""
    groups: list[list[Item]] = []
    for item in items:
        if groups and len(groups[-1]) < size and item.number == groups[-1][-1].number + 1:
            groups[-1].append(item)
        else:
            groups.append([item])
    return [*groups]


def _open(
    bench: Bench, items: Sequence[Item], groups: list[Sequence[Item]], folder: Path, how: Generation
) -> list[tuple[int, frozenset[str]]]:
    """Begin or go on: the groups to paint, with what is missing of each."""
    record = _record(bench, items, how)
    path = record_path(folder)
    if path.is_file():
        _refuse_other(path, record)
    elif folder.is_dir() and any(folder.iterdir()):
        raise BenchError(
            f"{folder} holds files, but no {path.name} says what they are. Give a new folder with -o."
        )
    contents = look(bench, items, folder, how.side_px)
    if contents.extra:
        require_exact(folder, type(contents)(missing=(), extra=contents.extra))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record | {"complete": False})
    missing = frozenset(contents.missing)
    wanted = [
        (n, frozenset(f for item in group for f in bench.files(item)) & missing)
        for n, group in enumerate(groups)
    ]
    return [(number, files) for number, files in wanted if files]


def _close(bench: Bench, items: Sequence[Item], folder: Path, how: Generation) -> None:
    require_exact(folder, look(bench, items, folder, how.side_px))
    shutil.rmtree(_part_folder(folder), ignore_errors=True)
    write_json(record_path(folder), _record(bench, items, how) | {"complete": True})


def _record(bench: Bench, items: Sequence[Item], how: Generation) -> dict[str, Any]:
    return {
        "bench": bench.name,
        "official": len(items) == bench.prompts,
        "images_per_prompt": bench.images_per_prompt,
        "side_px": how.side_px,
        "batch_prompts": how.batch_prompts,
        **how.about,
        "items": {item.key: item.category for item in items},
    }


def _refuse_other(path: Path, record: dict[str, Any]) -> None:
    before = read_json(path)
    if not isinstance(before, dict):
        raise BenchError(f"{path} is no record of `iomm evaluate generate`. Give a new folder with -o.")
    record = json.loads(json.dumps(record))
    other = [name for name in record if name != "iomm" and before.get(name) != record[name]]
    if other:
        shown = [f"{name}: {str(before.get(name))[:80]}, now {str(record[name])[:80]}" for name in other]
        raise BenchError(
            f"{path.name} says that the folder was begun otherwise ({'; '.join(shown)}). Its pictures would "
            "not be of one kind: give a new folder with -o, or the settings of before."
        )


def _write_group(
    bench: Bench,
    group: Sequence[Item],
    folder: Path,
    private: Path,
    pictures_BCHW: Tensor,
    missing: frozenset[str],
) -> None:
    each = bench.images_per_prompt
    if len(pictures_BCHW) != each * len(group) or pictures_BCHW.dtype != torch.uint8:
        raise AssertionError(
            f"{tuple(pictures_BCHW.shape)} {pictures_BCHW.dtype} for {len(group)} prompts of {each}"
        )
    private.mkdir(parents=True, exist_ok=True)
    for i, item in enumerate(group):
        for path, image in to_files(bench, item, pictures_BCHW[i * each : (i + 1) * each]).items():
            if path in missing:
                image.save(private / "picture", format="PNG")
                _move(private / "picture", folder / path)
        for path, text in item.texts:
            if path in missing:
                (private / "text").write_text(text)
                _move(private / "text", folder / path)


def _move(part: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part.replace(path)


def _part_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def _by_rank_0[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """What rank 0 finds. Its error is every rank's: nobody may wait for a rank that gave up."""
    said: tuple[Any, str] = (None, "")
    if mesh.rank == 0:
        try:
            said = (action(), "")
        except (ValueError, OSError) as error:
            said = (None, str(error))
    found, problem = mesh.broadcast_object(said)
    if problem:
        raise BenchError(problem)
    return found
