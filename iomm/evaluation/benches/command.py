"""`iomm evaluate generate | score | read`: what the command line says."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iomm.encoders import Encoders
    from iomm.evaluation.benches.summary import Result
    from iomm.system import System

NAMES = ("geneval", "dpg", "wise", "wise_verified", "imgedit")
GENERATE = "paint a benchmark's prompts into the folder that its official scorer reads"
SCORE = "score a generated folder here: GenEval by a detector, the others by a judge that answers"
READ = "scores with intervals from what an official scorer wrote"


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm evaluate generate`, beside the checkpoint's. Imports nothing heavy."""
    _add_bench(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the new folder, or one to go on with"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="the benchmark's own file or folder; GenEval's comes with the repository",
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--original", action="store_true", help="paint the prompts as they are (default)")
    texts.add_argument(
        "--rewritten", type=Path, help="paint these texts: the same file or folder with other texts in it"
    )
    parser.add_argument(
        "--subset", action="store_true", help="allow fewer prompts; the score compares with nothing"
    )
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1: none (default 3)")
    parser.add_argument("--batch", type=int, default=4, help="prompts painted at once (default 4)")
    parser.add_argument("--originals", type=Path, help="imgedit: the folder of images to edit")
    parser.add_argument("--image-guidance", type=float, default=1.5, help="imgedit: guidance by the image")
    parser.add_argument("--mask-ratio", type=float, default=0.5, help="imgedit: share of patch tokens masked")


def add_read_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm evaluate read`."""
    _add_bench(parser)
    parser.add_argument("results", type=Path, nargs="+", help="files that the official scorer wrote")
    parser.add_argument(
        "--generated", type=Path, required=True, help="the folder that `iomm evaluate generate` wrote"
    )
    parser.add_argument(
        "--questions", type=Path, help="dpg: ELLA's dpg_bench.csv, whose first row its scorer skips"
    )
    parser.add_argument("--judge", default="official scorer", help="judge and version, for the record")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("-o", "--output", type=Path, help="the scores (default: GENERATED.scores.json)")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm evaluate score`."""
    _add_bench(parser)
    parser.add_argument("generated", type=Path, help="the folder that `iomm evaluate generate` wrote")
    parser.add_argument("--prompts", type=Path, help="the prompts that it was generated from")
    parser.add_argument("--detector", type=Path, help="geneval: a folder with Mask2Former's weights")
    parser.add_argument("--clip", type=Path, help="geneval: a folder with CLIP's weights")
    parser.add_argument("--judge-url", help="an OpenAI-compatible endpoint (default: IOMM_JUDGE_URL)")
    parser.add_argument("--judge-model", help="the model's name there")
    parser.add_argument("--judge-folder", type=Path, help="or a folder with a multimodal LLM that chats")
    parser.add_argument(
        "--judge-prompt", type=Path, help="wise, imgedit: the official instruction of the judge"
    )
    parser.add_argument("--questions", type=Path, help="dpg: ELLA's dpg_bench.csv")
    parser.add_argument("--originals", type=Path, help="imgedit: the folder of images that were edited")
    parser.add_argument("--workers", type=int, default=8, help="questions under way at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("-o", "--output", type=Path, help="the scores (default: GENERATED.scores.json)")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bench", choices=NAMES, required=True)


def generate(
    arguments: argparse.Namespace, side_px: int, system: "System", encoders: "Encoders", about: dict[str, Any]
) -> int:
    """Run `iomm evaluate generate` on an opened checkpoint; all ranks call.

    Args:
        side_px: of the checkpoint's pictures.
        about: what was opened, for the record.
    Raises:
        BenchError, OSError: as in `load_prompts`, `check_items`, `write_folder`.
    """
    from dataclasses import asdict

    import iomm
    from iomm.data.shard_command import bar
    from iomm.evaluation.benches.generate import Generation, write_folder
    from iomm.evaluation.benches.layout import BenchError, digest, load_prompts, originals_digest
    from iomm.evaluation.benches.painter import Sampling, check_items, editor, painter
    from iomm.evaluation.benches.table import BENCHES
    from iomm.evaluation.shapes.evaluation import weights_digest
    from iomm.parallel.mesh import start

    bench = BENCHES[arguments.bench]
    prompts: Path = arguments.prompts or shipped_prompts(arguments.bench)
    items = load_prompts(bench, prompts, arguments.rewritten, subset=arguments.subset)
    edits = any(item.source is not None for item in items)
    if edits != (arguments.originals is not None):
        raise BenchError("--originals FOLDER holds the images to edit: give it with imgedit, and only then.")
    check_items(items, encoders, arguments.originals)
    how = Sampling(
        seed=arguments.seed,
        steps=arguments.steps,
        method=arguments.method,
        guidance=arguments.guidance,
        image_guidance=arguments.image_guidance,
        mask_ratio=arguments.mask_ratio,
    )
    about = {
        "checkpoint": {**about, "weights": weights_digest(system)},
        "prompts": {
            "sha256": digest(prompts),
            "painted": "original" if arguments.rewritten is None else "rewritten",
            "rewritten_sha256": None if arguments.rewritten is None else digest(arguments.rewritten),
            **({"originals_sha256": originals_digest(items, arguments.originals)} if edits else {}),
        },
        "sampling": asdict(how),
        "iomm": iomm.__version__,
    }
    if edits:
        paint = editor(system, encoders, how, arguments.originals, side_px)
    else:
        paint = painter(bench, system, encoders, how)
    mesh = start(system.config.parallel)
    settings = Generation(side_px=side_px, batch_prompts=arguments.batch, about=about)
    with bar("painting", 1.0, shown=mesh.rank == 0) as update:
        painted = write_folder(
            bench,
            items,
            arguments.output,
            paint,
            settings,
            mesh,
            lambda done, of: update(done / of, f"{done} of this rank's {of} prompts"),
        )
    if mesh.rank == 0:
        scorer = bench.scorer.format(folder=arguments.output, side=side_px)
        sys.stdout.write(
            f"{arguments.output}: {len(items)} prompts, {painted} painted now\nscore: {scorer}\n"
        )
    return 0


def shipped_prompts(bench: str) -> Path:
    """The prompts that come with the repository.

    Raises:
        BenchError: there are none for this benchmark, or iomm was installed without the repository.
    """
    import iomm
    from iomm.evaluation.benches.layout import BenchError

    path = Path(iomm.__file__).parents[1] / "examples/prompts/geneval/evaluation_metadata.jsonl"
    if bench == "geneval" and path.is_file():
        return path
    raise BenchError(
        f"the prompts of {bench} do not come with iomm. Give them with --prompts; examples/prompts/README.md "
        "says where they are."
    )


def read(arguments: argparse.Namespace) -> int:
    """Run `iomm evaluate read`.

    Raises:
        BenchError, OSError: as in `read_record`, `read_results`, `summarise`.
    """
    from iomm.evaluation.benches.summary import summarise
    from iomm.evaluation.benches.table import BENCHES, read_results

    record = _record_of(arguments)
    reading = read_results(arguments.bench, arguments.results, arguments.questions)
    result = summarise(BENCHES[arguments.bench], record["items"], reading, seed=arguments.seed)
    return write_result(
        result, record, arguments.judge, arguments.output or _scores_path(arguments.generated)
    )


def score(arguments: argparse.Namespace) -> int:
    """Run `iomm evaluate score`.

    Raises:
        BenchError, OSError: other prompts than were generated, a folder that is not exact, or as in the
        judges.
    """
    from iomm.evaluation.benches.journal import Journal
    from iomm.evaluation.benches.layout import (
        BenchError,
        digest,
        load_prompts,
        look,
        originals_digest,
        require_exact,
    )
    from iomm.evaluation.benches.scoring import judge_folder
    from iomm.evaluation.benches.summary import summarise
    from iomm.evaluation.benches.table import BENCHES

    record, bench = _record_of(arguments), BENCHES[arguments.bench]
    prompts: Path = arguments.prompts or shipped_prompts(arguments.bench)
    if digest(prompts) != record["prompts"]["sha256"]:
        raise BenchError(f"{prompts} is not what {arguments.generated} was generated from. Give that file.")
    items = load_prompts(bench, prompts, subset=not record["official"])
    edited: Path | None = arguments.originals
    if edited is not None and originals_digest(items, edited) != record["prompts"].get("originals_sha256"):
        raise BenchError(f"{edited} does not hold the images that were edited. Give the folder of before.")
    require_exact(arguments.generated, look(bench, items, arguments.generated, record["side_px"]))
    journal = Journal(arguments.generated.with_name(arguments.generated.name + ".answers.jsonl"))
    judge, reading, settings = judge_folder(arguments, items, journal)
    result = summarise(bench, record["items"], reading, seed=arguments.seed)
    path = arguments.output or _scores_path(arguments.generated)
    return write_result(result, record, judge, path, settings)


def write_result(
    result: "Result", record: dict[str, Any], judge: str, path: Path, settings: dict[str, Any] | None = None
) -> int:
    """Write and show a score with all that it was taken with, and leave it to the run's report; the exit
    status."""
    from iomm.evaluation.benches.summary import describe
    from iomm.evaluation.benches.table import BENCHES
    from iomm.evaluation.scores import BenchScore, leave_score, write_json

    made_with = {name: value for name, value in record.items() if name not in ("items", "complete")}
    write_json(path, {**result.to_dict(), "judge": judge, **(settings or {}), "generated": made_with})
    run_dir = record["checkpoint"].get("run_dir")
    if run_dir is not None and Path(run_dir).is_dir():
        score = BenchScore(
            bench=result.bench,
            step=record["checkpoint"]["step"],
            prompts=result.prompts,
            images_per_prompt=record["images_per_prompt"],
            judge=judge,
            best=BENCHES[result.bench].best,
            settings={
                **(settings or {}),
                **{name: record[name] for name in ("prompts", "sampling")},
                "weights": "EMA" if record["checkpoint"]["ema"] else "last",
            },
            overall=result.overall,
            parts=result.categories,
        )
        leave_score(Path(run_dir), score)
    if not record["official"]:
        sys.stdout.write("a subset of the prompts: compares with nothing\n")
    sys.stdout.write(f"{describe(result)}{path}\n")
    return 0


def _record_of(arguments: argparse.Namespace) -> dict[str, Any]:
    from iomm.evaluation.benches.generate import read_record
    from iomm.evaluation.benches.layout import BenchError

    record = read_record(arguments.generated)
    if record["bench"] != arguments.bench:
        raise BenchError(f"{arguments.generated} was generated for {record['bench']}, not {arguments.bench}.")
    return record


def _scores_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".scores.json")
