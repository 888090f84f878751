"""Scores of a generated GenEval folder by a detector on this machine.

OUT.results.jsonl     what the official `evaluate_images.py` would write, for its own `summary_scores.py`
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from iomm.evaluation.benches import geneval
from iomm.evaluation.benches.journal import Journal, identity_of
from iomm.evaluation.benches.layout import Item
from iomm.evaluation.benches.rules import Thing, kept, verdict
from iomm.evaluation.benches.summary import Reading
from iomm.files import write_whole


class Finder(Protocol):
    """A detector."""

    name: str

    def require(self, classes: set[str]) -> None: ...
    def find(self, image: Image.Image) -> dict[str, list[Thing]]: ...
    def colors(self, image: Image.Image, things: Sequence[Thing], name: str) -> list[str]: ...


def judge_geneval(
    items: Sequence[Item],
    folder: Path,
    finder: Finder,
    journal: Journal,
    results: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Reading:
    """Judge every picture; pictures that were judged before are not judged again.

    Args:
        results: the file to write, in the official scorer's form.
    Raises:
        BenchError: the detector does not know all things.
    """
    wanted = {item.key: json.loads(item.texts[0][1]) for item in items}
    clauses = [
        clause for m in wanted.values() for kind in ("include", "exclude") for clause in m.get(kind, ())
    ]
    finder.require({clause["class"] for clause in clauses})
    lines, total = [], geneval.IMAGES * len(items)
    for item in items:
        for name in geneval.GENEVAL.pictures(item):
            path = folder / name
            found = _judge(path, item, wanted[item.key], finder, journal)
            lines.append(geneval.result_line(str(path), item, **found))
            on_progress(len(lines), total)
    write_whole(results, "".join(lines))
    return geneval.read_results([results])


def _judge(
    path: Path, item: Item, metadata: dict[str, Any], finder: Finder, journal: Journal
) -> dict[str, Any]:
    identity = identity_of(finder.name, json.dumps(metadata), path.read_bytes())
    found = journal.get(identity)
    if found is None:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        things = kept(finder.find(image), item.category)
        correct, reason = verdict(things, metadata, lambda some, name: finder.colors(image, some, name))
        boxes = {name: [[*thing.box, thing.score] for thing in of] for name, of in things.items()}
        found = {"correct": correct, "reason": reason, "details": boxes}
        journal.put(identity, found)
    return found
