"""`iomm shapes make | check` and the options of `iomm evaluate shapes`: what the command line says."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iomm.evaluation import edit_command

if TYPE_CHECKING:
    from iomm.data.shard_writer import Progress
    from iomm.encoders import Encoders
    from iomm.evaluation.scores import BenchScore
    from iomm.system import System

DESCRIPTION = "the shapes world: a benchmark of text-to-image generation that needs no judge"
EVALUATE = "paint the prompts of the shapes world and judge the pictures exactly"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm shapes`. Imports nothing heavy."""
    what = parser.add_subparsers(required=True, metavar="WHAT", dest="what")

    text = "draw unlabeled images, pairs and held-out pairs into shards; goes on where it was stopped"
    make = what.add_parser("make", help=text, description=text)
    make.add_argument("output", type=Path, help="folder of the shards")
    make.add_argument("--images", type=int, required=True, help="unlabeled images")
    make.add_argument("--pairs", type=int, default=4000, help="images with a caption (default 4000)")
    make.add_argument("--heldout", type=int, default=256, help="pairs for the held-out loss (default 256)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument(
        "--seen-only",
        action="store_true",
        help="unlabeled images too without the combinations that pairs do not show",
    )
    cores = len(os.sched_getaffinity(0))
    make.add_argument("--processes", type=int, default=cores, help=f"(default: all cores, {cores})")

    text = "how often the detector is right, by category"
    check = what.add_parser("check", help=text, description=text)
    check.add_argument("--scenes", type=int, default=2000, help="of each category (default 2000)")
    check.add_argument("--seed", type=int, default=0)
    check.add_argument("--codec", help="send the pictures through this autoencoder first: a diffusers folder")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm evaluate shapes`, beside the checkpoint's."""
    parser.add_argument("--guidance", type=float, help="guidance scale; 1: none (default 3)")
    parser.add_argument(
        "--edits",
        action="store_true",
        help="have scenes edited instead (recolour, add, remove, move, count), zero-shot",
    )
    parser.add_argument(
        "--per-category", type=int, default=40, help="prompts of each, or edits of each action (default 40)"
    )
    parser.add_argument("--images-per-prompt", type=int, help="(default 1)")
    parser.add_argument("--batch", type=int, default=32, help="pictures painted at once (default 32)")
    parser.add_argument("-o", "--output", type=Path, default=Path("shapes"), help="folder of the results")
    edit_command.add_settings(parser.add_argument_group("with --edits"))


def check_evaluate_arguments(arguments: argparse.Namespace) -> None:
    """Raises:
    ValueError: a number that is none, or an option that `--edits` has no use for.
    """
    edit_command.check_settings(arguments)
    for name in ("per_category", "batch", "images_per_prompt"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if arguments.edits and (arguments.guidance is not None or arguments.images_per_prompt is not None):
        raise ValueError(
            "--edits has --image-guidance and --text-guidance and one picture an edit: leave --guidance and "
            "--images-per-prompt out."
        )


def run(arguments: argparse.Namespace) -> int:
    """Run one of `iomm shapes`; the exit status.

    Raises:
        ValueError, OSError: as in `make_world`, `measure`, `open_codec`.
    """
    return {"make": _make, "check": _check}[arguments.what](arguments)


def _make(arguments: argparse.Namespace) -> int:
    from iomm.evaluation.shapes.shards import World, make_world

    world = World(
        images=arguments.images,
        pairs=arguments.pairs,
        heldout=arguments.heldout,
        seed=arguments.seed,
        images_show_heldout=not arguments.seen_only,
    )
    total = arguments.images + arguments.pairs + arguments.heldout
    done: dict[str, int] = {}
    from iomm.data.shard_command import bar

    with bar("drawing", total) as update:

        def on_progress(name: str, now: "Progress") -> None:
            done[name] = now.images
            update(sum(done.values()), name)

        indexes = make_world(world, arguments.output, processes=arguments.processes, on_progress=on_progress)
    for name, index in indexes.items():
        sys.stdout.write(f"--set data.{name}={index}\n")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    import torch

    from iomm.autoencoder import open_codec
    from iomm.config import CodecConfig
    from iomm.evaluation.shapes.check import measure

    codec = None
    if arguments.codec is not None:
        codec = open_codec(CodecConfig(path=arguments.codec), torch.float32, torch.device("cpu"))
    found = measure(arguments.scenes, seed=arguments.seed, codec=codec)
    sys.stdout.write(f"{'category':15} {'correct':>8} {'exact':>8} {'all the same':>13}\n")
    for category, of in found.items():
        sys.stdout.write(f"{category:15} {of.correct:8.2%} {of.exact:8.2%} {of.same:13.2%}\n")
    return 0


def evaluate(
    arguments: argparse.Namespace, system: "System", encoders: "Encoders", about: dict[str, Any]
) -> int:
    """Run `iomm evaluate shapes` on an opened checkpoint.

    Args:
        about: what was opened, for the record; with its `step`, whether it is the `ema`, and the `run_dir`
            that keeps the scores for its report (None: no run does).
    Raises:
        ValueError: as in `evaluate_shapes` and `evaluate_edits`.
    """
    if arguments.edits:
        return _evaluate_edits(arguments, system, encoders, about)
    from iomm.evaluation.shapes.evaluation import (
        EvaluationOptions,
        describe,
        evaluate_shapes,
        weights_digest,
        write_evaluation,
    )
    from iomm.evaluation.shapes.kept import shapes_scores

    options = EvaluationOptions(
        per_category=arguments.per_category,
        images_per_prompt=arguments.images_per_prompt or 1,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=3.0 if arguments.guidance is None else arguments.guidance,
        method=arguments.method,
        batch_images=arguments.batch,
    )
    found, images_NHW3 = evaluate_shapes(system, encoders, options)
    about = {**about, "weights": weights_digest(system)}
    write_evaluation(arguments.output, found, images_NHW3, options, about)
    _keep(shapes_scores(found, options, about), about)
    sys.stdout.write(f"{describe(found)}{arguments.output}\n")
    return 0


def _keep(scores: "list[BenchScore]", about: dict[str, Any]) -> None:
    from iomm.evaluation.scores import leave_score

    for score in scores:
        if about["run_dir"] is not None:
            leave_score(Path(about["run_dir"]), score)


def _evaluate_edits(
    arguments: argparse.Namespace, system: "System", encoders: "Encoders", about: dict[str, Any]
) -> int:
    from iomm.evaluation.shapes.edit_evaluation import (
        EditOptions,
        describe_edits,
        evaluate_edits,
        write_edits,
    )
    from iomm.evaluation.shapes.evaluation import weights_digest
    from iomm.evaluation.shapes.kept import edit_scores

    options = EditOptions(
        per_action=arguments.per_category,
        seed=arguments.seed,
        steps=arguments.steps,
        mask_ratio=arguments.mask_ratio,
        image_guidance=arguments.image_guidance,
        text_guidance=arguments.text_guidance,
        aux_prompt=arguments.aux_prompt,
        method=arguments.method,
        batch_images=arguments.batch,
    )
    edited = evaluate_edits(system, encoders, options)
    write_edits(arguments.output, edited, options, {**about, "weights": weights_digest(system)})
    _keep(edit_scores(edited.score, options, about), about)
    sys.stdout.write(f"{describe_edits(edited.score)}{arguments.output}\n")
    return 0
