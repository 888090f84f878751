"""WISE (no licence file, so nothing of it is shipped; PKU-YuanGroup/WISE): 1,000 prompts, one image each.

    OUT/<prompt_id>.png                    1.png .. 1000.png

    legacy      three marks of 0, 1 or 2; (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2
    verified    about 200 other prompts and a judge that says 0 or 1; its default since 2026-04

The overall score weighs the six categories' means; the weights are not the same in both, and the scores of
one compare with nothing of the other. An official scorer writes 999 (early ones 9.9) for a mark that it
could not read: no score here, and counted.

The layout of verified's score lines is documented nowhere that we could read; we take the one field that is a
number beside `prompt_id`, and refuse lines that have more.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iomm.evaluation.benches.layout import Bench, BenchError, Item
from iomm.evaluation.benches.records import field, read_json, read_lines
from iomm.evaluation.benches.summary import Reading

PROMPTS = 1000
MARKS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
UNREAD = (999, 9.9)

# Categories by the id of their last prompt. Verified's are as its weights say: 400 and five times 120.
_LEGACY_ENDS = {"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}
_VERIFIED_ENDS = {
    "culture": 400,
    "time": 520,
    "space": 640,
    "biology": 760,
    "physics": 880,
    "chemistry": 1000,
}
LEGACY_WEIGHTS = {
    "culture": 0.4,
    "time": 0.167,
    "space": 0.133,
    "biology": 0.1,
    "physics": 0.1,
    "chemistry": 0.1,
}
VERIFIED_WEIGHTS = {
    "culture": 0.4,
    "time": 0.12,
    "space": 0.12,
    "biology": 0.12,
    "physics": 0.12,
    "chemistry": 0.12,
}


def wiscore(consistency: float, realism: float, aesthetic_quality: float) -> float:
    """Legacy's score of one image, in [0, 1], from marks in [0, 2]."""
    marks = (consistency, realism, aesthetic_quality)
    return sum(weight * mark for weight, mark in zip(MARKS.values(), marks, strict=True)) / 2


def category_of(prompt_id: int, ends: dict[str, int]) -> str:
    """The category that a prompt id lies in."""
    return next(name for name, end in ends.items() if prompt_id <= end)


def read_legacy(path: Path) -> list[Item]:
    """Items of WISE's `data/` folder, or of one file with all of them.

    Raises:
        BenchError: not these files, or verified's.
        OSError: no such file.
    """
    return _read_prompts(path, _LEGACY_ENDS, verified=False)


def read_verified(path: Path) -> list[Item]:
    """Items of WISE's `data_verified/` folder, or of one file with all of them. Raises as `read_legacy`."""
    return _read_prompts(path, _VERIFIED_ENDS, verified=True)


def _read_prompts(path: Path, ends: dict[str, int], *, verified: bool) -> list[Item]:
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise BenchError(f"no .json in {path}. Give WISE's data{'_verified' if verified else ''}/.")
    other = [file.name for file in files if path.is_dir() and file.stem.endswith("_verified") is not verified]
    if other:
        raise BenchError(
            f"{path} holds {', '.join(other)}, prompts of {'legacy' if verified else 'verified'} WISE. Use "
            f"--bench {'wise' if verified else 'wise_verified'}: the two do not compare."
        )
    records: dict[int, tuple[str, str]] = {}
    for file in files:
        content = read_json(file)
        for record in content if isinstance(content, list) else [content]:
            where = f"{file}, {str(record)[:60]}"
            if not isinstance(record, dict):
                raise BenchError(f"{where}: no prompt of WISE. Give its data folder.")
            prompt_id = _prompt_id(record, where)
            if prompt_id in records:
                raise BenchError(f"{where}: prompt_id {prompt_id} is there twice. Give one variant's files.")
            explanation = record.get("Explanation", "")
            records[prompt_id] = (field(record, "Prompt", str, where), str(explanation))
    return [
        Item(
            number=prompt_id - 1,
            key=str(prompt_id),
            category=category_of(prompt_id, ends),
            text=text,
            asks={"PROMPT": text, "EXPLANATION": explanation},
        )
        for prompt_id, (text, explanation) in sorted(records.items())
    ]


def read_results_legacy(paths: Sequence[Path]) -> Reading:
    """The scores in the files that `gpt_eval.py` wrote for its three sets of prompts.

    Raises:
        BenchError: not such files, a prompt twice, or a mark that is none.
    """
    return _read_results(paths, _legacy_score)


def read_results_verified(paths: Sequence[Path]) -> Reading:
    """The scores in the files of the verified scorer. Raises as `read_results_legacy`."""
    return _read_results(paths, _verified_score)


def _read_results(paths: Sequence[Path], score_of: Callable[[dict[str, Any], str], float | None]) -> Reading:
    scores: dict[str, float] = {}
    unparsed: list[str] = []
    for path in paths:
        for number, (_, record) in enumerate(read_lines(path), 1):
            where = f"{path}, line {number}"
            key = str(_prompt_id(record, where))
            if key in scores or key in unparsed:
                raise BenchError(f"{where}: prompt {key} was judged before. Give each file once.")
            score = score_of(record, where)
            if score is None:
                unparsed.append(key)
            else:
                scores[key] = score
    return Reading(scores=scores, unparsed=tuple(unparsed))


def _legacy_score(record: dict[str, Any], where: str) -> float | None:
    marks = [float(field(record, name, (int, float), where)) for name in MARKS]
    if any(mark in UNREAD for mark in marks):
        return None
    if any(mark not in (0, 1, 2) for mark in marks):
        raise BenchError(f"{where}: {marks} are no marks of WISE (0, 1 or 2). Give legacy's results.")
    return wiscore(*marks)


def _verified_score(record: dict[str, Any], where: str) -> float | None:
    numbers = {
        name: value
        for name, value in record.items()
        if name != "prompt_id" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(numbers) != 1:
        raise BenchError(
            f"{where}: one number beside prompt_id is expected, got {numbers}. Are these legacy's results? "
            "Then --bench wise."
        )
    ((name, score),) = numbers.items()
    if score in UNREAD:
        return None
    if score not in (0, 1):
        raise BenchError(
            f"{where}: {name} must be 0 or 1, got {score}. Are these legacy's results? Then --bench wise."
        )
    return float(score)


def _prompt_id(record: dict[str, Any], where: str) -> int:
    prompt_id = field(record, "prompt_id", int, where)
    if not 1 <= prompt_id <= PROMPTS:
        raise BenchError(f"{where}: prompt_id {prompt_id} is not in [1, {PROMPTS}].")
    return prompt_id


def _pictures(item: Item) -> tuple[str, ...]:
    return (f"{item.key}.png",)


_SCORER_WRITES = ("Results*/", "Results*")
WISE = Bench(
    name="wise",
    prompts=PROMPTS,
    images_per_prompt=1,
    tiles=1,
    weights=LEGACY_WEIGHTS,
    pictures=_pictures,
    read_prompts=read_legacy,
    best=1,
    scorer="python gpt_eval.py --image_dir {folder} ...",
    scorer_writes=_SCORER_WRITES,
)
WISE_VERIFIED = Bench(
    name="wise_verified",
    prompts=PROMPTS,
    images_per_prompt=1,
    tiles=1,
    weights=VERIFIED_WEIGHTS,
    pictures=_pictures,
    read_prompts=read_verified,
    best=1,
    scorer="IMAGE_DIR={folder} bash eval_qwen.sh",
    scorer_writes=_SCORER_WRITES,
)
