"""One input through `iomm shard make | check | index` and the loader: what became of each thing put in.

An image is accounted for if it is used, or rejected by name with a reason, or if its shard or source as a
whole is refused with a reason that names the file. Anything else is a problem: an image lost in silence, a
sound one refused, an error that is no message to the user, memory that ran out.
"""

import contextlib
import functools
import io
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iomm import cli
from iomm.config import DataConfig
from iomm.data import index, stores
from iomm.data.errors import BadSampleReport
from iomm.data.hashing import cache_key
from iomm.data.index import Index
from iomm.data.loader import Loader
from iomm.data.shard_writer import QUARANTINE, SET_INDEX
from tests.data.fuzz.cases import Case, Put
from tests.data.fuzz.images import MAX_PIXELS
from tests.data.fuzz.surroundings import happening, log_kept

SIDE_PX = 16
BATCH = 2
_REASON_LIMIT = 20_000  # characters
OUTCOMES = ("used", "rejected", "refused", "left alone")


@dataclass
class Found:
    """What a route says of an input."""

    used: list[tuple[str, str]] = field(default_factory=list)  # key, content hash
    captioned: set[str] = field(default_factory=set)  # keys
    reasons: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    refused: str | None = None  # the whole shard or source
    left_out: int = 0  # that the log counts, without naming each
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What became of an input by one route."""

    outcome: str  # one of OUTCOMES: the worst of its images'
    reasons: list[str]
    problems: list[str]
    left_out: int  # entries that the log counts


cli._parser = functools.cache(cli._parser)  # a third of the time otherwise


class Refusal(Exception):
    """A message to the user instead of a result."""


def run(case: Case, scratch: Path, decode: str = "cpu") -> dict[str, Verdict]:
    """The verdict of each route that the case asks for; with DALI only that of the loader."""
    steps: dict[str, Callable[[], Found]] = {
        "load": lambda: _load(case, decode),
        "make": lambda: _make(case, case.output or scratch / "made"),
        "check": lambda: _check(case),
        "index": lambda: _index(case),
        "load by index": lambda: _load(case, decode, buckets=case.buckets),
    }
    found: dict[str, Verdict] = {}
    for route in case.routes:
        asked = case.source if route == "make" else case.shard
        if asked is None or (decode == "dali" and route != "load"):
            continue
        if route == "load by index" and found["index"].outcome == "refused":
            continue
        if route == "check" and not case.indexed:
            continue
        # A damaged index may be refused; it is good again once `iomm shard index` has been called.
        forgiving = case.indexed and route in ("load", "check")
        told = found["index"].left_out if route == "load by index" else 0
        found[route] = _judged(case, steps[route], forgiving, told)
    return found


def _judged(case: Case, step: Callable[[], Found], forgiving: bool, told: int) -> Verdict:
    """`told`: entries without an image that `iomm shard index` spoke of."""
    index._open_again.cache_clear()  # commands are processes of their own
    with log_kept() as records, happening(case.during):
        try:
            found = step()
        except Refusal as refusal:
            found = Found(refused=str(refusal))
        except BaseException as error:
            trace = "".join(traceback.format_exception(error)[-6:])
            return Verdict("refused", [], [f"{type(error).__name__} is no message to the user:\n{trace}"], 0)
    found.left_out += told
    for row in records:
        if "left out" in row.msg and isinstance(row.args, tuple):
            found.left_out += int(str(row.args[1]))
            found.reasons.append(("", row.getMessage()))
    return judge(case, found, forgiving)


def judge(case: Case, found: Found, forgiving: bool = False) -> Verdict:
    """Whether everything put in is accounted for."""
    outcomes, problems = ["used"], list(found.problems)
    hashes = [cache_key(put.image) for put in case.puts]
    left_out = found.left_out
    for put, digest in zip(case.puts, hashes, strict=True):
        outcome = _outcome(put, digest, hashes, found, left_out, case.swallows)
        left_out -= outcome == "left out"
        if outcome is None:
            problems.append(
                f"{put.token} was lost in silence: not used, not rejected, no refusal of the whole"
            )
        elif put.must and outcome != "used" and not forgiving:
            problems.append(f"{put.token} is sound and was not used: {found.refused or found.reasons}")
        outcomes.append({"left out": "rejected", None: "used"}.get(outcome, outcome or ""))
    if case.indexed and (foreign := [key for key, digest in found.used if digest not in hashes]):
        problems.append(f"the bytes of {foreign} are none that were put in")
    reasons = [reason for _, reason in found.reasons] + [found.refused] * bool(found.refused)
    for reason in reasons:
        if not reason or len(reason) > _REASON_LIMIT:
            problems.append(f"a reason of {len(reason or '')} characters: {(reason or '')[:200]!r}")
        elif "MemoryError" in reason or "Cannot allocate" in reason:
            problems.append(f"memory ran out: {reason}")
    worst = max(outcomes, key=OUTCOMES.index)
    return Verdict(worst, [reason or "" for reason in reasons], problems, found.left_out)


def _outcome(
    put: Put, digest: str, hashes: Sequence[str], found: Found, left_out: int, swallows: bool
) -> str | None:
    if any(digest == other for _, other in found.used):
        return "used"
    if any(put.token in name for name, _ in found.reasons):
        return "rejected"
    if any(put.token in key and other not in hashes for key, other in found.used):
        return "used"  # what its damaged bytes became
    if found.refused is not None:
        return "refused"
    if put.silent or swallows:
        return "left alone"
    return "left out" if left_out else None


def _command(*arguments: str | Path, names: Sequence[Path]) -> tuple[str, str]:
    """Run an `iomm` command in this process; what it prints.

    Raises:
        Refusal: it failed with a message that names one of the files.
    """
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(argument) for argument in arguments])
    out.flush()
    out.seek(0)
    printed, said = out.read(), err.getvalue()
    if status and "no usable image in the sources" not in said:
        message = said + printed
        if not _names(message, names):
            raise AssertionError(f"exit status {status}, and a message that names no file: {message!r}")
        raise Refusal(message[:_REASON_LIMIT])
    return printed, said


def _names(message: str, paths: Sequence[Path]) -> bool:
    return any(path.name in message or repr(path.name)[1:-1] in message for path in paths)


def _make(case: Case, output: Path) -> Found:
    assert case.source is not None
    limits = ("--max-pixels", str(MAX_PIXELS), "--processes", "1")
    images = ("--shard-images", "1") if case.output else ()
    _command("shard", "make", "-o", output, *limits, *images, "--", case.source, names=(case.source, output))
    found = _quarantined(case, output)
    if (output / SET_INDEX).exists():
        try:
            made = _delivered([str(output / SET_INDEX)], threads=2, decode="cpu")
        except Refusal as refusal:
            if case.output is None:
                raise
            found.refused = str(refusal)
        else:
            found.used, found.captioned = made.used, made.captioned
            if made.reasons:
                found.problems.append(f"shard make took what the loader cannot use: {made.reasons}")
    for put in case.puts:
        has_key = any(put.token in key for key, _ in found.used)
        if put.must and put.caption is not None and has_key and not _spoken_of(put, found):
            found.problems.append(f"{put.token} lost its caption in silence")
    return found


def _quarantined(case: Case, output: Path) -> Found:
    found = Found()
    if case.output is not None and not (output / QUARANTINE).is_file():
        return found  # the make was done before its folder was damaged
    for line in (output / QUARANTINE).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            if case.output is None:
                raise
            continue  # what was damaged before the make went on
        # A row about the source itself speaks for all that is not named.
        if row["sample"] == str(case.source):
            found.refused = row["reason"]
        else:
            found.reasons.append((_named(row["sample"], case), row["reason"]))
    return found


def _named(sample: str, case: Case) -> str:
    """What a row of the quarantine list calls a sample, without the path of its source."""
    name = sample.removeprefix(str(case.source))
    if name.startswith(": row ") and case.puts:  # of Parquet
        return case.puts[int(name.removeprefix(": row "))].token
    return name


def _spoken_of(put: Put, found: Found) -> bool:
    """Whether its caption is there, or a reason why not."""
    return put.token in found.captioned or any(put.token in name for name, _ in found.reasons)


def _index(case: Case) -> Found:
    assert case.shard is not None
    _command(
        "shard", "index", "--max-pixels", str(MAX_PIXELS), "--processes", "1", "--", case.shard,
        names=[case.shard],
    )  # fmt: skip
    opened = Index.open(f"{case.shard}{stores.INDEX_SUFFIX}")
    found = Found()
    for j in range(opened.shards[0].images):
        try:
            sample = opened.sample(0, j)
        except ValueError as error:  # the index was kept: by its checksums it fits the shard
            raise Refusal(str(error)) from error
        if sample.reason is None:
            found.used.append((sample.key, sample.content_hash or ""))
        else:
            found.reasons.append((sample.key, sample.reason))
    return found


def _check(case: Case) -> Found:
    """Only that the command ends as it should; what it says of a shard is not about single images."""
    assert case.shard is not None
    _command("shard", "check", "--processes", "1", "--", case.shard, names=[case.shard.parent])
    return Found(used=[(put.token, cache_key(put.image)) for put in case.puts])


def _shards(case: Case) -> list[Path]:
    assert case.shard is not None
    return [case.shard, *case.shard.parent.glob("*.tar")]


def _load(case: Case, decode: str, *, buckets: bool = False) -> Found:
    try:
        data = {**case.data, "buckets": buckets, "decode": decode}
        found = _delivered([str(case.shard)], threads=1 if case.during else 2, **data)
    except Refusal as refusal:
        if not _names(str(refusal), _shards(case)):
            raise AssertionError(f"a message that names no shard: {refusal}") from refusal
        raise
    for put in case.puts:
        used = any(put.token in key for key, _ in found.used)
        asked = put.must and put.caption is not None and not put.json
        if asked and used and not _spoken_of(put, found):
            found.problems.append(f"{put.token} is no pair, in silence")
    return found


def _delivered(patterns: Sequence[str], *, threads: int, **settings: Any) -> Found:
    """An epoch of the loader, of images and of pairs.

    Raises:
        Refusal: the shards are refused.
    """
    reports: list[BadSampleReport] = []
    found = Found()
    data: dict[str, Any] = {
        "images": tuple(patterns),
        "image_px": SIDE_PX,
        "max_image_pixels": MAX_PIXELS,
        "decode_threads": threads,
        "prefetch_batches": threads - 1,
        **settings,
    }
    try:
        try:
            loader = _loader(DataConfig(**data, pairs=tuple(patterns), mix_ratio=0.5), reports)
        except ValueError as error:
            if "none with a caption" not in str(error):
                raise
            loader = _loader(DataConfig(**data), reports)
        size, pairs = loader.size("image"), loader.size("pair")
        indices = range(2 * (size + BATCH) if pairs else size + BATCH)
        batches = [indices[at : at + BATCH] for at in range(0, len(indices), BATCH)]
        for wanted, batch in zip(batches, loader.stream(batches), strict=True):
            assert batch.image_BCHW.shape == (len(wanted), 3, *loader.size_px(wanted[0]))
            rows = list(zip(batch.keys, batch.hashes, batch.captions, strict=True))
            found.used += [(key, digest) for key, digest, _ in rows]
            found.captioned |= {key for key, _, caption in rows if caption is not None}
    except (ValueError, OSError) as error:
        if "no readable image" not in str(error):
            raise Refusal(f"{type(error).__name__}: {error}") from error
    found.reasons = [(report.key, report.reason) for report in reports]
    if not found.used and not reports:
        found.problems.append("neither an image nor a reason")
    return found


def _loader(data: DataConfig, reports: list[BadSampleReport]) -> Loader:
    return Loader(data, 1, on_bad=reports.append, global_batch_images=BATCH, token_px=4)
