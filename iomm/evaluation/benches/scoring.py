"""`iomm evaluate score`: which judge looks at a folder, from what the command line gives."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from iomm.data.shard_command import bar
from iomm.evaluation.benches.journal import Journal
from iomm.evaluation.benches.judges import URL, Endpoint, Judge, ask_all
from iomm.evaluation.benches.layout import BenchError, Item, digest
from iomm.evaluation.benches.summary import Reading


def judge_folder(
    arguments: argparse.Namespace, items: Sequence[Item], journal: Journal
) -> tuple[str, Reading, dict[str, Any]]:
    """Judge a folder: the judge's name, what it said, and what it was told, for the record.

    Raises:
        BenchError: an option is missing, or the benchmark cannot be judged here; or as in the judges.
    """
    folder: Path = arguments.generated
    with bar("judging", 1.0) as update:

        def on_progress(done: int, of: int) -> None:
            update(done / of, f"{done} of {of}")

        if arguments.bench == "geneval":
            return _detect(arguments, items, journal, on_progress)
        if arguments.bench == "wise_verified":
            raise BenchError(
                "wise_verified is not scored here: its judge's answers are documented nowhere that we could "
                "read. Run its own scorer, then `iomm evaluate read`."
            )
        from iomm.evaluation.benches.judged import judge_dpg, judge_imgedit, judge_wise

        judge = _judge(arguments)
        ask = partial(ask_all, judge, journal=journal, workers=arguments.workers, on_progress=on_progress)
        if arguments.bench == "dpg":
            told = _given(arguments, "questions")
            reading = judge_dpg(items, folder, told, ask)
        else:
            told = _given(arguments, "judge_prompt")
            if arguments.bench == "wise":
                reading = judge_wise(items, folder, told, ask)
            else:
                originals = _given(arguments, "originals")
                reading = judge_imgedit(items, folder, told, originals, ask)
        return judge.name, reading, {"judge_told_sha256": digest(told)}


def _detect(
    arguments: argparse.Namespace, items: Sequence[Item], journal: Journal, on_progress: Any
) -> tuple[str, Reading, dict[str, Any]]:
    import torch

    from iomm.evaluation.benches.detected import judge_geneval
    from iomm.evaluation.benches.detector import Detector

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finder = Detector(_given(arguments, "detector"), _given(arguments, "clip"), device)
    folder: Path = arguments.generated
    results = folder.with_name(folder.name + ".results.jsonl")
    reading = judge_geneval(items, folder, finder, journal, results, on_progress=on_progress)
    return finder.name, reading, {}


def _judge(arguments: argparse.Namespace) -> Judge:
    url = arguments.judge_url or os.environ.get(URL)
    if arguments.judge_folder is not None:
        if arguments.judge_url or arguments.judge_model:
            raise BenchError("--judge-folder is a judge of its own: leave --judge-url and --judge-model out.")
        import torch

        from iomm.evaluation.benches.local_judge import LocalJudge

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return LocalJudge(_given(arguments, "judge_folder"), device)
    if not url or not arguments.judge_model:
        raise BenchError(
            f"a judge is needed: --judge-url URL (or {URL}) of an OpenAI-compatible endpoint and "
            "--judge-model NAME, or --judge-folder FOLDER with a model."
        )
    return Endpoint(url, arguments.judge_model)


def _given(arguments: argparse.Namespace, name: str) -> Path:
    path: Path | None = getattr(arguments, name)
    if path is None:
        raise BenchError(f"{arguments.bench} needs --{name.replace('_', '-')} PATH.")
    if not path.exists():
        raise FileNotFoundError(f"--{name.replace('_', '-')} {path} is not there. Give the file or folder.")
    return path
