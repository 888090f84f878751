"""DPG-Bench (Apache-2.0; TencentQQGYLab/ELLA): 1,065 long prompts x 4 images, judged by yes-or-no questions.

    OUT/<stem of the prompt's .txt>.png    the four images as a 2x2 grid, row by row

`compute_dpg_bench.py --resolution` is the side of one tile. What it does without saying so, and what follows:

- It skips the first row of its CSV. That prompt's other questions depend on the skipped one, so it fails.
- A file that fails is printed and left out of the mean. So `read` counts the files itself; only the prompt
  of the first row may be lost, and only if the CSV is given to say which that is.
- Its category scores are of the last tile alone; they are noted as it printed them, never averaged again.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from iomm.evaluation.benches.layout import Bench, BenchError, Item
from iomm.evaluation.benches.summary import Reading

TILES = 4
_ROW = re.compile(r"^(?P<path>.+?)(?P<scores>(?:, (?:\d+(?:\.\d+)?(?:e-?\d+)?)){2,})$")
_SCORE = re.compile(r"^DPG-Bench score: (?P<score>\d+(?:\.\d+)?)$")
_CATEGORY = re.compile(r"^\t(?P<name>[^:]+): (?P<score>\d+(?:\.\d+)?)$")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of `dpg_bench.csv`."""

    number: int  # proposition_id, from 1
    text: str
    depends: tuple[int, ...]  # questions that have to be answered yes for this one to count


def read_prompts(path: Path) -> list[Item]:
    """Items of ELLA's folder of prompts, one .txt each, in the order of their names.

    Raises:
        BenchError: no such folder, or none in it.
    """
    files = sorted(path.glob("*.txt"))
    if not files:
        raise BenchError(
            f"no .txt in {path}. Give ELLA's dpg_bench/prompts, or the like with rewritten texts."
        )
    return [
        Item(number=number, key=file.stem, category="prompts", text=file.read_text(encoding="utf-8").strip())
        for number, file in enumerate(files)
    ]


def read_questions(path: Path) -> dict[str, list[Question]]:
    """All questions of `dpg_bench.csv` by prompt, its first row included.

    Raises:
        BenchError: not this file.
        OSError: no such file.
    """
    questions: dict[str, list[Question]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                parents = tuple(int(number) for number in row["dependency"].split(","))
                question = Question(
                    number=int(row["proposition_id"]),
                    text=row["question_natural_language"].strip(),
                    depends=tuple(number for number in parents if number != 0),
                )
                questions.setdefault(row["item_id"], []).append(question)
            except (KeyError, ValueError, AttributeError) as error:
                raise BenchError(
                    f"{path}, line {line} is no question of DPG-Bench ({error!r}). Give ELLA's dpg_bench.csv."
                ) from error
    return questions


def first_prompt(questions: dict[str, list[Question]]) -> tuple[str, ...]:
    """The prompt that the official scorer cannot judge, because it skips the first row; none if it can."""
    key = next(iter(questions), None)
    if key is None:
        return ()
    skipped, *rest = questions[key]
    return (key,) if any(skipped.number in question.depends for question in rest) else ()


def tile_score(questions: Sequence[Question], answers: dict[int, bool]) -> float:
    """The share of questions that count as yes; one that depends on a no is a no.

    Questions count in their order, on parents that may have been zeroed before, as in the official scorer.
    """
    scores = dict(answers)
    for question in questions:
        if any(not scores[parent] for parent in question.depends):
            scores[question.number] = False
    return sum(scores.values()) / len(scores)


def read_results(paths: Sequence[Path], lost: tuple[str, ...] = ()) -> Reading:
    """The scores in a `dpg-bench_*_results.txt`: one number a prompt, the mean of its four tiles.

    Args:
        lost: what the official scorer cannot judge, of `first_prompt`.
    Raises:
        BenchError: not such a file, a prompt twice, or not four tiles.
    """
    if len(paths) != 1:
        raise BenchError(f"DPG-Bench has one results file, got {len(paths)}. Give dpg-bench_*_results.txt.")
    scores: dict[str, float] = {}
    reported, notes = None, []
    for number, line in enumerate(paths[0].read_text(encoding="utf-8").split("\n"), 1):
        where = f"{paths[0]}, line {number}"
        if total := _SCORE.match(line):
            reported = float(total["score"]) / 100
        elif category := _CATEGORY.match(line):
            notes.append(f"as printed, last tile only: {category['name'].strip()} {category['score']}")
        elif row := _ROW.match(line):
            key, score = _prompt_score(row, where)
            if key in scores:
                raise BenchError(f"{where}: {key} was judged before. Score into a new file.")
            scores[key] = score
        elif line.strip() and not line.startswith(
            ("Model:", "L1 ", "L2 ", "Image path:", "Save results to:")
        ):
            raise BenchError(f"{where} is no line of DPG-Bench's results: {line[:80]}")
    if reported is None:
        raise BenchError(
            f"{paths[0]} has no line `DPG-Bench score: ...`: the scorer did not finish. Run it again."
        )
    return Reading(scores=scores, known_lost=lost, reported=reported, notes=tuple(notes))


def _prompt_score(row: re.Match[str], where: str) -> tuple[str, float]:
    *tiles, mean = (float(score) for score in row["scores"].split(", ")[1:])
    key = PurePosixPath(row["path"].replace("\\", "/")).name.split(".")[0]
    if len(tiles) != TILES:
        raise BenchError(f"{where}: {key} has {len(tiles)} tiles. Score with --pic-num {TILES}.")
    if not 0 <= min(tiles) <= max(tiles) <= 1 or abs(sum(tiles) / TILES - mean) > 1e-6:
        raise BenchError(f"{where}: {mean} is not the mean of {tiles}. Give the file as it was written.")
    return key, mean


DPG = Bench(
    name="dpg",
    prompts=1065,
    images_per_prompt=TILES,
    tiles=2,
    weights=None,
    pictures=lambda item: (f"{item.key}.png",),
    read_prompts=read_prompts,
    best=1,
    scorer="python dpg_bench/compute_dpg_bench.py --image-root-path {folder} --resolution {side} --pic-num 4",
    scorer_writes=("dpg-bench_*_results.txt", "dpg-bench_*_results_detail.txt"),
)
