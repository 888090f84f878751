"""`iomm shard make | index | check`: what the command line says, and what is printed. (`iomm shard encode` is
`iomm.training.encode`.)"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from iomm.config import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from iomm.data.inspection import Limits

_SHOWN = 20  # unusable images of a shard
DESCRIPTION = "pack images into shards, index shards, check them, encode them for the feature cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options. Imports nothing heavy."""
    what = parser.add_subparsers(required=True, metavar="WHAT", dest="what")

    text = "pack folders of images, tars or Parquet files into shards; goes on where it was stopped"
    make = what.add_parser("make", help=text, description=text)
    make.add_argument("source", nargs="+", help="a folder (KEY.jpg with KEY.txt or KEY.json), tars, .parquet")
    make.add_argument("-o", "--output", type=Path, required=True, help="folder of the shards")
    make.add_argument("--shard-bytes", type=int, default=1_000_000_000, help="of images (default 1e9)")
    make.add_argument("--shard-images", type=int, default=10_000, help="at most (default 10000)")
    make.add_argument("--image-column", default="image", help="of Parquet (default image)")
    make.add_argument("--caption-field", default="caption", help="of JSON and Parquet (default caption)")

    text = "index shards that exist, so that training opens them at once and knows their bad images"
    index = what.add_parser("index", help=text, description=text)
    index.add_argument("shard", nargs="+", help="tars, globs or folders of them; s3:// and gs:// too")
    index.add_argument("-o", "--output", help="also one index of them all, for data.images")
    index.add_argument("--force", action="store_true", help="decode everything again, also what fits")

    text = "compare shards with their indexes: headers, and the hash of every image"
    check = what.add_parser("check", help=text, description=text)
    check.add_argument("shard", nargs="+", help="tars, folders of them, or indexes")

    text = "fill a run's feature cache (data.cache_dir) before training; goes on where it was stopped"
    ranks = " On several GPUs: torchrun --nproc-per-node=8 -m iomm.cli shard encode ..."
    encode = what.add_parser("encode", help=text, description=text + "." + ranks)
    encode.add_argument("config", type=Path, help="a Python file with a function config() -> Config")
    encode.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting")

    cores = len(os.sched_getaffinity(0))
    for sub in (make, index, check):
        sub.add_argument("--processes", type=int, default=cores, help=f"(default: all cores, {cores})")
        limits = {"--max-pixels": MAX_IMAGE_PIXELS, "--max-image-bytes": MAX_IMAGE_BYTES}
        for name, limit in limits.items():
            sub.add_argument(
                name, type=int, default=limit, help=f"of an image (default {limit:,}, as in training)"
            )


def run(arguments: argparse.Namespace) -> int:
    """Run one of the three; the exit status: 0 all is well, 1 something is not.

    Raises:
        ValueError, OSError: as in `make_shards`, `index_shard`, `merge_indexes`.
    """
    from iomm.data.inspection import Limits

    limits = Limits(max_pixels=arguments.max_pixels, max_image_bytes=arguments.max_image_bytes)
    command = {"make": _make, "index": _index, "check": _check}[arguments.what]
    return command(arguments, limits)


def _make(arguments: argparse.Namespace, limits: "Limits") -> int:
    from iomm.data.shard_writer import QUARANTINE, SET_INDEX, MakeOptions, Progress, make_shards
    from iomm.data.sources import open_sources

    column, caption = arguments.image_column, arguments.caption_field
    sources = open_sources(arguments.source, limits, image_column=column, caption_field=caption)
    options = MakeOptions(
        shard_bytes=arguments.shard_bytes,
        shard_images=arguments.shard_images,
        processes=arguments.processes,
        limits=limits,
    )
    with bar("packing", len(sources)) as update:

        def on_progress(now: Progress) -> None:
            update(now.source, f"{now.images} images in {now.shards} shards, {now.rejected} left out")

        done = make_shards(sources, arguments.output, options, on_progress=on_progress)
    index, left_out = arguments.output / SET_INDEX, arguments.output / QUARANTINE
    sys.stdout.write(
        f"{done.images} images, {done.captions} with a caption, in {done.shards} shards\n"
        f"left out: {done.duplicates} duplicates, {done.rejected} unusable; {done.bad_captions} images were "
        f"kept without their caption. Reasons: {left_out}\n"
    )
    if not done.images:
        sys.stderr.write(f"iomm: error: no usable image in the sources. {left_out} says why.\n")
        return 1
    sys.stdout.write(f"train on them with: --set data.images={index}\n")
    return 0


def _index(arguments: argparse.Namespace, limits: "Limits") -> int:
    from iomm.data.indexer import index_shard, merge_indexes
    from iomm.data.stores import INDEX_SUFFIX, expand

    shards = expand([_shards_in(path) for path in arguments.shard])
    failed = 0
    with bar("indexing", len(shards)) as update:
        for n, shard in enumerate(shards):

            def on_progress(done: int, of: int, n: int = n, shard: str = shard) -> None:
                update(n + done / of, shard)

            try:
                made = index_shard(
                    shard,
                    limits=limits,
                    processes=arguments.processes,
                    force=arguments.force,
                    on_progress=on_progress,
                )
            except (ValueError, OSError) as error:
                sys.stderr.write(f"iomm: error: {error}\n")
                failed += 1
                continue
            what = "indexed" if made.renewed else "the index fits"
            say(f"{shard}: {what}, {made.images} images, {len(made.bad)} of them unusable\n")
            for sample in made.bad[:_SHOWN]:
                say(f"  sample {sample.key!r}: {sample.reason}\n")
            if len(made.bad) > _SHOWN:
                sys.stdout.write(f"  and {len(made.bad) - _SHOWN} more\n")
    if failed:
        sys.stderr.write(f"iomm: error: {failed} of {len(shards)} shards could not be indexed.\n")
        return 1
    if arguments.output is not None:
        merge_indexes([shard + INDEX_SUFFIX for shard in shards], arguments.output)
        sys.stdout.write(f"train on them with: --set data.images={arguments.output}\n")
    return 0


def _check(arguments: argparse.Namespace, limits: "Limits") -> int:
    from iomm.data.index import Index
    from iomm.data.indexer import check_shard
    from iomm.data.stores import INDEX_SUFFIX, expand

    wrong = 0
    for path in expand([_shards_in(path) for path in arguments.shard]):
        try:
            index = Index.open(path if path.endswith(INDEX_SUFFIX) else path + INDEX_SUFFIX)
        except (ValueError, OSError) as error:
            say(f"{path}: {error}\n")
            wrong += 1
            continue
        for k, shard in enumerate(index.paths):
            problems = check_shard(index, k, processes=arguments.processes, limits=limits)
            say("".join(f"{shard}: {problem}\n" for problem in problems) or f"{shard}: ok\n")
            wrong += bool(problems)
    return 1 if wrong else 0


def say(text: str) -> None:
    """Print what may name files, whose names need not be text."""
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())


def _shards_in(path: str) -> str:
    """A folder stands for the tars in it."""
    from iomm.data.stores import is_remote

    if is_remote(path):
        return path if path.endswith((".tar", ".index")) or "*" in path else f"{path.rstrip('/')}/*.tar"
    return os.path.join(path, "*.tar") if os.path.isdir(path) else path


@contextmanager
def bar(text: str, total: float, *, shown: bool = True) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on the error stream, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    ) as progress:
        task = progress.add_task(text, total=total, now="")
        yield lambda done, now: progress.update(task, completed=done, now=now)
