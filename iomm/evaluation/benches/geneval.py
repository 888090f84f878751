"""GenEval (MIT; djghosh13/geneval): 553 prompts x 4 images, judged by a detector and CLIP.

    OUT/00000/metadata.jsonl               the line of evaluation_metadata.jsonl
    OUT/00000/samples/00000.png .. 00003.png

Its `evaluate_images.py` opens every folder whose name is all digits, and writes one line an image. The score
is the mean of the six tasks' means, not the mean of the images.
"""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from iomm.evaluation.benches.layout import Bench, BenchError, Item
from iomm.evaluation.benches.records import field, read_lines
from iomm.evaluation.benches.summary import Reading, prompt_means

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
IMAGES = 4


def read_prompts(path: Path) -> list[Item]:
    """Items of an `evaluation_metadata.jsonl`.

    Raises:
        BenchError: a line that is no GenEval prompt.
        OSError: no such file.
    """
    items = []
    for number, (line, record) in enumerate(read_lines(path)):
        where = f"{path}, prompt {number}"
        tag = field(record, "tag", str, where)
        if tag not in TASKS:
            raise BenchError(f"{where}: {tag} is no task of GenEval. There are {', '.join(TASKS)}.")
        field(record, "include", list, where)
        key = f"{number:05d}"
        beside = ((f"{key}/metadata.jsonl", f"{line}\n"),)
        text = field(record, "prompt", str, where)
        items.append(Item(number=number, key=key, category=tag, text=text, texts=beside))
    return items


def read_results(paths: Sequence[Path]) -> Reading:
    """The scores in what `evaluate_images.py` wrote: one number a prompt, the share of its images that are
    right.

    Raises:
        BenchError: not such a file, or an image twice.
    """
    images: dict[str, dict[str, float]] = {}
    tags: dict[str, str] = {}
    for path in paths:
        for number, (_, record) in enumerate(read_lines(path), 1):
            where = f"{path}, line {number}"
            name = PurePosixPath(field(record, "filename", str, where).replace("\\", "/"))
            if len(name.parts) < 3 or not name.parts[-3].isdigit():
                raise BenchError(f"{where}: {name} is no path like OUT/00000/samples/00000.png.")
            key, tag = name.parts[-3], field(record, "tag", str, where)
            if name.name in images.setdefault(key, {}):
                raise BenchError(f"{where}: {key}/{name.name} was judged before. Give each result once.")
            if tags.setdefault(key, tag) != tag:
                raise BenchError(
                    f"{where}: prompt {key} is {tags[key]} and {tag}. Give the results of one run."
                )
            images[key][name.name] = float(field(record, "correct", bool, where))
    return Reading(scores=prompt_means(images, IMAGES), categories=tags)


def result_line(
    path: str, item: Item, *, correct: bool, reason: str, details: dict[str, list[list[float]]]
) -> str:
    """One line as `evaluate_images.py` writes it."""
    metadata = json.loads(item.texts[0][1])
    record = {
        "filename": path,
        "tag": item.category,
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }
    return json.dumps(record) + "\n"


GENEVAL = Bench(
    name="geneval",
    prompts=553,
    images_per_prompt=IMAGES,
    tiles=1,
    weights=None,
    pictures=lambda item: tuple(f"{item.key}/samples/{image:05d}.png" for image in range(IMAGES)),
    read_prompts=read_prompts,
    best=1,
    scorer="python evaluation/evaluate_images.py {folder} --outfile results.jsonl",
    scorer_writes=("results*.jsonl",),
)
