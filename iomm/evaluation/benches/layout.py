"""What a benchmark asks for, and what of it is in a folder.

A layout is a list of items, one a prompt, each with the files that the official scorer opens. Nothing else
may lie in the folder, except what the scorer itself writes there.
"""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_NAMED = 5  # files and keys that a message names


class BenchError(ValueError):
    """Prompts, pictures or results that are not what the benchmark needs."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt."""

    number: int  # place among the prompts, from 0; decides the noise
    key: str  # what the scorer calls it
    category: str
    text: str  # what is painted
    texts: tuple[tuple[str, str], ...] = ()  # files beside the pictures: path, content
    source: str | None = None  # the image to edit, relative to the folder of originals
    asks: Mapping[str, str] | None = None  # what its judge is told beside the picture


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark."""

    name: str
    prompts: int  # of the whole benchmark
    images_per_prompt: int
    tiles: int  # pictures a side in one file
    weights: Mapping[str, float] | None  # of categories in the overall score; None: all alike
    pictures: Callable[[Item], tuple[str, ...]]  # files of an item, relative to the folder
    read_prompts: Callable[[Path], list[Item]]
    best: float  # the largest possible score
    scorer: str  # its command, with {folder} and {side}
    scorer_writes: tuple[str, ...]  # patterns of what the official scorer leaves in the folder

    def files(self, item: Item) -> tuple[str, ...]:
        """All files of an item, relative to the folder."""
        return (*self.pictures(item), *(path for path, _ in item.texts))


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder has of a layout."""

    missing: tuple[str, ...]  # files that are not there, or are damaged
    extra: tuple[str, ...]


def load_prompts(
    bench: Bench, prompts: Path, rewritten: Path | None = None, *, subset: bool = False
) -> list[Item]:
    """The benchmark's items, in order.

    Args:
        prompts: the official file or folder.
        rewritten: the same with other texts, which are then painted; the scorer sees the original ones.
        subset: fewer prompts than the benchmark has are all right.
    Raises:
        BenchError: not the official number of prompts, not the same items in both, or an unusable file.
        OSError: a file that cannot be read.
    """
    items = _read(bench, prompts)
    whole = len(items) == bench.prompts
    if not whole and (not subset or len(items) > bench.prompts or not items):
        raise BenchError(
            f"{prompts} holds {len(items)} prompts, {bench.name} has {bench.prompts}. Give the official "
            "file; for a trial with fewer, whose score compares with nothing, add --subset."
        )
    if rewritten is None:
        return items
    others = {item.key: item for item in _read(bench, rewritten)}
    wrong = sorted({item.key for item in items} ^ others.keys())
    wrong += [item.key for item in items if item.key in others and others[item.key].category != item.category]
    if wrong:
        raise BenchError(
            f"{rewritten} and {prompts} do not hold the same prompts: {named(wrong)}. A rewritten file has "
            "the form of the original one, with the same keys and other texts."
        )
    return [replace(item, text=others[item.key].text) for item in items]


def _read(bench: Bench, path: Path) -> list[Item]:
    items = bench.read_prompts(path)
    keys = [item.key for item in items]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if twice:
        raise BenchError(f"{path} holds a prompt twice: {named(twice)}. Give the official file.")
    empty = [item.key for item in items if not item.text.strip()]
    if empty:
        raise BenchError(f"{path} has prompts without a text: {named(empty)}. Give the official file.")
    return items


def look(bench: Bench, items: Sequence[Item], folder: Path, side_px: int) -> Contents:
    """Compare a folder with the layout. A picture counts if it is a PNG of the right size that decodes.

    Args:
        side_px: of one picture.
    """
    wanted: dict[str, str | None] = {}
    for item in items:
        wanted.update(dict.fromkeys(bench.pictures(item)))
        wanted.update(item.texts)
    size = (bench.tiles * side_px, bench.tiles * side_px)
    missing = [
        path
        for path, text in wanted.items()
        if not (_is_whole(folder / path, size) if text is None else _holds(folder / path, text))
    ]
    parents = {str(parent) for path in wanted for parent in Path(path).parents}
    extra = []
    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        names = [str(here / name) for name in files if str(here / name) not in wanted]
        names += [f"{here / name}/" for name in folders if str(here / name) not in parents]
        extra += [name for name in names if not _of_scorer(bench, name)]
    return Contents(missing=tuple(missing), extra=tuple(sorted(extra)))


def require_exact(folder: Path, contents: Contents) -> None:
    """Raises:
    BenchError: a file is missing, damaged or too many; names some.
    """
    said = []
    if contents.missing:
        said.append(
            f"{len(contents.missing)} files are missing or damaged ({named(contents.missing)}): run "
            "`iomm evaluate generate` again, it writes what is missing"
        )
    if contents.extra:
        said.append(f"{len(contents.extra)} do not belong there ({named(contents.extra)}): remove them")
    if said:
        raise BenchError(f"{folder} is not what the scorer expects. {'; '.join(said)}.")


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's text and JSON files with their names."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(f for s in ("txt", "json") for f in path.glob(f"*.{s}")):
        if file != path:
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def originals_digest(items: Sequence[Item], originals: Path) -> str:
    """SHA-256 of the images to edit, with their names."""
    total = hashlib.sha256()
    for source in sorted({str(item.source) for item in items}):
        with (originals / source).open("rb") as file:
            total.update(f"{source}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _is_whole(path: Path, size: tuple[int, int]) -> bool:
    try:
        with Image.open(path) as image:
            if image.format != "PNG" or image.size != size:
                return False
            image.load()
    except (OSError, SyntaxError, UnidentifiedImageError):  # Pillow reports a broken PNG as SyntaxError
        return False
    return True


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except (OSError, UnicodeDecodeError):
        return False


def _of_scorer(bench: Bench, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in bench.scorer_writes)
