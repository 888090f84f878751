"""ImgEdit Basic (no licence file, so nothing of it is shipped; PKU-YuanGroup/ImgEdit): 737 edits of 9 kinds.

    OUT/<key>.png                          keys of basic_edit.json

Its judge writes three marks from 1 to 5 in a text. An edit's score is their mean, a kind's the mean of its
edits, and the overall score the mean of the kinds. (The official scripts round edits and kinds to two
decimals; here nothing is rounded. They also take whatever lines end in a number; here an answer without
exactly three marks has no score and is counted.)
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from iomm.evaluation.benches.layout import Bench, BenchError, Item
from iomm.evaluation.benches.records import field, read_json
from iomm.evaluation.benches.summary import Reading

MARKS = 3
_MARK = re.compile(r"^[^:]+: (?P<mark>\d+)$")


def read_prompts(path: Path) -> list[Item]:
    """Items of `basic_edit.json`, in its order.

    Raises:
        BenchError: not this file.
        OSError: no such file.
    """
    items = []
    for number, (key, record) in enumerate(_entries(path).items()):
        where = f"{path}, {key}"
        if not isinstance(record, dict):
            raise BenchError(f"{where} is no edit. Give ImgEdit's basic_edit.json.")
        if "/" in key or key.startswith("."):
            raise BenchError(f"{where}: the key is no file name. Give ImgEdit's basic_edit.json.")
        text, category = field(record, "prompt", str, where), field(record, "edit_type", str, where)
        source = field(record, "id", str, where)
        if PurePosixPath(source).is_absolute() or ".." in PurePosixPath(source).parts:
            raise BenchError(f"{where}: the id {source} leaves the folder of originals. Give ImgEdit's file.")
        items.append(Item(number=number, key=key, category=category, text=text, source=source))
    return items


def read_answer(answer: str) -> float | None:
    """The mean of the marks in a judge's text, in [1, 5]; None if it has not exactly three."""
    lines = [_MARK.match(line.strip()) for line in answer.splitlines()]
    marks = [int(line["mark"]) for line in lines if line is not None]
    if len(marks) != MARKS or not 1 <= min(marks) <= max(marks) <= 5:
        return None
    return sum(marks) / MARKS


def read_results(paths: Sequence[Path]) -> Reading:
    """The scores in the `result.json` that `basic_bench.py` wrote.

    Raises:
        BenchError: not this file.
    """
    if len(paths) != 1:
        raise BenchError(f"ImgEdit has one result file, got {len(paths)}. Give result.json.")
    scores, unparsed = {}, []
    for key, answer in _entries(paths[0]).items():
        if isinstance(answer, int | float):
            raise BenchError(
                f"{paths[0]} holds averages, which no longer show what could not be read. Give result.json."
            )
        score = read_answer(answer) if isinstance(answer, str) else None
        if score is None:
            unparsed.append(key)
        else:
            scores[key] = score
    return Reading(scores=scores, unparsed=tuple(unparsed))


def _entries(path: Path) -> dict[str, object]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise BenchError(f"{path} holds no object with one entry an edit. Give the file as it was written.")
    return content


IMGEDIT = Bench(
    name="imgedit",
    prompts=737,
    images_per_prompt=1,
    tiles=1,
    weights=None,
    pictures=lambda item: (f"{item.key}.png",),
    read_prompts=read_prompts,
    best=5,
    scorer="python basic_bench.py --result_img_folder {folder} --edit_json basic_edit.json ...",
    scorer_writes=("result.json", "average_score.json", "typescore.json"),
)
