"""Scores of a generated folder by a judge: DPG-Bench, WISE (legacy) and ImgEdit.

The published scores are of particular judges (mPLUG, gpt-4o-2024-05-13, gpt-4o). Another judge's scores are
recorded under its name and compare only with its own. Answers are read strictly: what is not exactly an
answer is counted as unparsed and is part of no score.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from iomm.evaluation.benches import dpg, imgedit, wise
from iomm.evaluation.benches.judges import Ask
from iomm.evaluation.benches.layout import BenchError, Item, named
from iomm.evaluation.benches.records import read_json
from iomm.evaluation.benches.summary import Reading

_YES_NO = re.compile(r"(yes|no)\.?", re.IGNORECASE)
_MARK = re.compile(r"\**(Consistency|Realism|Aesthetic Quality)\**\s*:\s*\**\s*([0-2])\**", re.IGNORECASE)
AskAll = Callable[[Mapping[str, Callable[[], Ask]]], dict[str, str]]  # `judges.ask_all` for one judge


def yes_or_no(answer: str) -> bool | None:
    """Whether an answer is yes; None if it is neither yes nor no."""
    found = _YES_NO.fullmatch(answer.strip())
    return None if found is None else found[1].lower() == "yes"


def wise_marks(answer: str) -> float | None:
    """The WiScore of an answer of three lines, one mark each; None of any other."""
    lines = [_MARK.fullmatch(line.strip()) for line in answer.strip().splitlines() if line.strip()]
    marks = {line[1].lower().replace(" ", "_"): float(line[2]) for line in lines if line is not None}
    if len(lines) != len(wise.MARKS) or marks.keys() != wise.MARKS.keys():
        return None
    return wise.wiscore(*(marks[name] for name in wise.MARKS))


def judge_dpg(
    items: Sequence[Item],
    folder: Path,
    questions: Path,
    ask_all: AskAll,
) -> Reading:
    """DPG-Bench by a judge that answers yes or no: all questions, the first row's too.

    Args:
        questions: `dpg_bench.csv`.
    Raises:
        BenchError: prompts without questions, or as in `ask_all`.
    """
    asked = dpg.read_questions(questions)
    lost = [item.key for item in items if item.key not in asked]
    if lost:
        raise BenchError(
            f"{questions} has no questions for {len(lost)} prompts: {named(lost)}. Give dpg_bench.csv."
        )
    asks = {
        f"{item.key}/{tile}/{question.number}": partial(
            _tile_ask, folder / f"{item.key}.png", tile, f"{question.text} Answer yes or no, nothing else."
        )
        for item in items
        for tile in range(dpg.TILES)
        for question in asked[item.key]
    }
    answers = ask_all(asks)
    scores, unparsed = {}, []
    for item in items:
        tiles = [
            {q.number: yes_or_no(answers[f"{item.key}/{tile}/{q.number}"]) for q in asked[item.key]}
            for tile in range(dpg.TILES)
        ]
        said = [{n: answer for n, answer in tile.items() if answer is not None} for tile in tiles]
        if any(len(tile) < len(asked[item.key]) for tile in said):
            unparsed.append(item.key)
        else:
            scores[item.key] = sum(dpg.tile_score(asked[item.key], tile) for tile in said) / dpg.TILES
    return Reading(scores=scores, unparsed=tuple(unparsed))


def judge_wise(
    items: Sequence[Item],
    folder: Path,
    template: Path,
    ask_all: AskAll,
) -> Reading:
    """WISE (legacy) by a judge that gives three marks.

    Args:
        template: the judge's instruction, with {PROMPT} and {EXPLANATION} where those of an item go. WISE
            states no licence, so its text (in its `gpt_eval.py`) is not shipped.
    Raises:
        BenchError: a template without {PROMPT}, or as in `ask_all`.
    """
    text = template.read_text(encoding="utf-8")
    if "{PROMPT}" not in text:
        raise BenchError(
            f"{template} must have {{PROMPT}} where the prompt goes, and {{EXPLANATION}} for its key."
        )
    asks = {item.key: partial(_wise_ask, text, item, folder / f"{item.key}.png") for item in items}
    answers = ask_all(asks)
    return _reading(answers, wise_marks)


def judge_imgedit(
    items: Sequence[Item],
    folder: Path,
    template: Path,
    originals: Path,
    ask_all: AskAll,
) -> Reading:
    """ImgEdit by a judge that sees the image before and after.

    Args:
        template: ImgEdit's prompts.json: the judge's instruction by kind of edit, with <edit_prompt> in it.
    Raises:
        BenchError: a kind without an instruction, or as in `ask_all`.
    """
    texts = read_json(template)
    kinds = sorted({item.category for item in items})
    lacking = (
        kinds if not isinstance(texts, dict) else [k for k in kinds if not isinstance(texts.get(k), str)]
    )
    if lacking:
        raise BenchError(
            f"{template} has no instruction for {', '.join(lacking)}. Give ImgEdit's prompts.json."
        )

    def ask(item: Item) -> Ask:
        before = _png(originals / str(item.source))
        text = texts[item.category].replace("<edit_prompt>", item.text)
        return Ask(text=text, pngs=(before, (folder / f"{item.key}.png").read_bytes()))

    asks = {item.key: partial(ask, item) for item in items}
    answers = ask_all(asks)
    return _reading(answers, imgedit.read_answer)


def _reading(answers: dict[str, str], read: Callable[[str], float | None]) -> Reading:
    scores = {key: read(answer) for key, answer in answers.items()}
    return Reading(
        scores={key: score for key, score in scores.items() if score is not None},
        unparsed=tuple(key for key, score in scores.items() if score is None),
    )


def _tile_ask(path: Path, tile: int, text: str) -> Ask:
    with Image.open(path) as grid:
        side = grid.width // 2
        x, y = tile % 2 * side, tile // 2 * side
        return Ask(text=text, pngs=(_encoded(grid.crop((x, y, x + side, y + side))),))


def _wise_ask(template: str, item: Item, path: Path) -> Ask:
    text = template
    for name, value in (item.asks or {}).items():
        text = text.replace(f"{{{name}}}", value)
    return Ask(text=text, pngs=(path.read_bytes(),))


def _png(path: Path) -> bytes:
    with Image.open(path) as image:
        return _encoded(image.convert("RGB"))


def _encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
