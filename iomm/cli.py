"""The `iomm` command. Heavy imports wait until a command needs them: `iomm --help` answers at once."""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from iomm.app import command as app_command
from iomm.data import shard_command
from iomm.evaluation import edit_command, reconstruction_command, status
from iomm.evaluation.benches import command as benches_command
from iomm.evaluation.shapes import command as shapes_command
from iomm.launch import slurm as launch_slurm
from iomm.plan import command as plan_command
from iomm_kernels import bench_cli

if TYPE_CHECKING:
    from iomm.config import Config


class UsageError(ValueError):
    """A command line that cannot be carried out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 failed, 2 bad command line, 85 saved and to be launched
    again, 128 + n stopped by signal n."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    if arguments.traceback:
        return command(arguments)
    try:
        return command(arguments)
    except Exception as error:
        if _expected(error):
            rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
            sys.stderr.write(f"iomm: error{rank}: {error}\n")
        elif _among_ranks():
            traceback.print_exc()
        else:
            raise
        if _among_ranks():
            _leave(1)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("iomm: interrupted\n")
        return 130


def _among_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _leave(status: int) -> NoReturn:
    """End without torch's destructors: where another rank is gone they wait for it, gloo's without end, and
    the launcher would start the ranks again only when its own patience is over."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _expected(error: Exception) -> bool:
    """Whether an error is a message to the user (one line) rather than a fault of ours (a traceback)."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("iomm.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="iomm", description="Image-only pre-training of image generators.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = functools.partial(_command, commands)

    train = add("train", _train, "train a run; goes on from its own latest checkpoint if there is one")
    train.add_argument("config", type=Path, help="a Python file with a function config() -> Config")
    train.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; may be repeated"
    )

    sample = add("sample", _sample, "paint pictures from prompts")
    _checkpoint_arguments(sample)
    sample.add_argument("--prompt", action="append", required=True, help="may be repeated; one picture each")
    sample.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1: none (default 3)")
    sample.add_argument("-o", "--output", type=Path, default=Path("grid.png"))

    rebuild = add("reconstruct", _reconstruct, "image -> masked condition -> generated image")
    _checkpoint_arguments(rebuild)
    rebuild.add_argument("image", type=Path)
    rebuild.add_argument(
        "--mask-ratio",
        type=float,
        action="append",
        help="share of patch tokens masked; may be repeated (default 0, 0.5, 0.85, 1)",
    )
    rebuild.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1: none (default)")
    rebuild.add_argument("-o", "--output", type=Path, default=Path("reconstruction.png"))

    edit = add("edit", _edit, edit_command.DESCRIPTION)
    _checkpoint_arguments(edit)
    edit_command.add_arguments(edit)

    app_command.add_arguments(add("app", app_command.run, app_command.DESCRIPTION))

    report = add("report", _report, "write a run's report: one self-contained HTML file")
    report.add_argument("run", type=Path)

    export = add("export", _export, "write a run's generator in the Hugging Face layout")
    export.add_argument("run", type=Path, help="a run's folder (its newest checkpoint) or one checkpoint")
    export.add_argument("-o", "--output", type=Path, required=True, help="the new folder")
    export.add_argument("--raw", action="store_true", help="the weights themselves, not their EMA")
    export.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="of the written weights (default: as stored)"
    )

    import_ = add("import", _import, "FLUX.1, Z-Image or an exported folder -> a checkpoint to train on")
    import_.add_argument("folder", type=Path, help="a folder in the Hugging Face layout")
    import_.add_argument("-o", "--output", type=Path, required=True, help="the new run's folder")
    import_.add_argument(
        "--config", type=Path, help="the run to train with it; needed for folders that iomm did not export"
    )
    import_.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting of --config"
    )

    demo = add("demo", _demo, "both stages on the shipped images, samples, report; no GPU needed")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the demo's runs (default runs/demo)"
    )
    demo.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        help="share of the steps to train; below 1 only tries the machinery",
    )

    text = "benchmarks: both sides of a choice, measured in one run"
    bench = commands.add_parser("bench", help=text, description=text)
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    add_bench = functools.partial(_command, benches)
    prefix = add_bench("prefix", _bench_prefix, "frozen-prefix split against the naive full pass")
    mask = add_bench("mask", _bench_mask, "what the mask modes zero, hide and drop cost in the frozen MLLM")
    mask.add_argument("--mask-ratio", type=float, default=0.85)
    for sub in (prefix, mask):
        sub.add_argument("--width", type=int, default=512, help="channels of the random MLLM (default 512)")
        sub.add_argument("--layers", type=int, default=8)
        sub.add_argument("--batch", type=int, default=4)
        sub.add_argument("--repeats", type=int, default=5)

    encoders = add_bench(
        "encoders", _bench_encoders, "encoder time of a step, first_stage against shared (under torchrun)"
    )
    encoders.add_argument("config", type=Path)
    encoders.add_argument("--set", action="append", default=[], metavar="A.B=VALUE")
    encoders.add_argument("--repeats", type=int, default=5)

    fp8 = add_bench("fp8", _bench_fp8, "loss and step time of a training run with each FP8 recipe")
    fp8.add_argument("config", type=Path)
    fp8.add_argument("--set", action="append", default=[], metavar="A.B=VALUE")

    data = add_bench("data", _bench_data, "images per second of one core: our loader, others, and the floor")
    data.add_argument("--images", type=int, default=1000, help="JPEGs of 1024 x 768 (default 1000)")
    data.add_argument("--large", type=int, default=200, help="JPEGs of 2400 x 1600 (default 200)")
    data.add_argument("--side", type=int, default=512, help="of the decoded square, px (default 512)")
    data.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes (default 5)")

    bench_cli.add_arguments(add_bench("kernels", bench_cli.run, bench_cli.DESCRIPTION))

    plan_command.add_arguments(
        add("plan", _plan, "memory, time and cost of a run on a cluster, and its fastest layout")
    )

    text = "put a training run on a cluster"
    launch = commands.add_parser("launch", help=text, description=text)
    clusters = launch.add_subparsers(required=True, metavar="CLUSTER")
    launch_slurm.add_arguments(_command(clusters, "slurm", _launch_slurm, launch_slurm.DESCRIPTION))

    shard_command.add_arguments(add("shard", _shard, shard_command.DESCRIPTION))

    shapes_command.add_arguments(add("shapes", shapes_command.run, shapes_command.DESCRIPTION))
    text = "benchmarks of a checkpoint's pictures"
    evaluate = commands.add_parser("evaluate", help=text, description=text)
    evaluations = evaluate.add_subparsers(required=True, metavar="BENCHMARK")
    add_evaluation = functools.partial(_command, evaluations)
    shapes = add_evaluation("shapes", _evaluate_shapes, shapes_command.EVALUATE)
    _checkpoint_arguments(shapes)
    shapes_command.add_evaluate_arguments(shapes)
    reconstruction_command.add_arguments(
        add_evaluation("reconstruction", _evaluate_reconstruction, reconstruction_command.DESCRIPTION)
    )
    generate = add_evaluation("generate", _evaluate_generate, benches_command.GENERATE)
    _checkpoint_arguments(generate)
    benches_command.add_generate_arguments(generate)
    benches_command.add_score_arguments(add_evaluation("score", benches_command.score, benches_command.SCORE))
    benches_command.add_read_arguments(add_evaluation("read", benches_command.read, benches_command.READ))

    status.add_arguments(add("status", status.run, status.DESCRIPTION))

    doctor = add("doctor", _doctor, "what this machine has, which backends are usable, and why not")
    doctor.add_argument(
        "--distributed", action="store_true", help="compare all ranks; launched like the training"
    )
    doctor.add_argument(
        "--config", type=Path, help="with --distributed: compare the settings of this run too"
    )
    doctor.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting of --config"
    )
    return parser


def _command(
    group: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command in a group of them (argparse's sub-parsers)."""
    sub = group.add_parser(name, help=text, description=text)
    sub.set_defaults(command=run)
    return sub


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their EMA")
    parser.add_argument("--steps", type=int, default=25, help="sampler steps (default 25)")
    parser.add_argument("--method", choices=["euler", "heun"], default="euler")
    parser.add_argument("--seed", type=int, default=0)


def load_config(path: Path) -> "Config":
    """The `Config` that a configuration file's `config()` returns.

    Raises:
        UsageError: no such file, or no such function in it.
    """
    import runpy

    from iomm.config import Config

    if not path.is_file():
        raise UsageError(
            f"no configuration at {path}. Give a Python file with a function config(), such as "
            "examples/configs/tiny_stage1.py."
        )
    function = runpy.run_path(str(path)).get("config")
    made = function() if callable(function) else None
    if not isinstance(made, Config):
        raise UsageError(f"{path} has no function config() that returns an iomm.config.Config.")
    return made


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config).override(arguments.set)
    from iomm.training.stop import exit_status
    from iomm.training.train import train

    outcome = train(config)
    if os.environ.get("RANK", "0") == "0":
        if outcome.stopped_by is not None:
            again = " ".join(["iomm train", str(arguments.config), *(f"--set {s}" for s in arguments.set)])
            by = outcome.stopped_by.name
            sys.stderr.write(f"stopped by {by} after step {outcome.step}, saved. Go on with: {again}\n")
        else:
            sys.stderr.write(
                f"done: {outcome.run_dir}, step {outcome.step}. Look at it with: iomm report "
                f"{outcome.run_dir}\n"
            )
    return 0 if outcome.stopped_by is None else exit_status(outcome.stopped_by)


def _sample(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.generator import open_generator
    from iomm.evaluation.grid import image_grid, save_png
    from iomm.sampling import paint

    _, encoders, system = open_generator(arguments.checkpoint, ema=not arguments.raw)
    pictures = paint(
        system,
        encoders,
        arguments.prompt,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        method=arguments.method,
    )
    columns = min(len(pictures), 6)
    sys.stdout.write(f"{save_png(image_grid(pictures, columns, arguments.prompt), arguments.output)}\n")
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    import torch

    from iomm.checkpoint.generator import open_generator
    from iomm.conditioning.mask import keep_tokens
    from iomm.data.decode import decode_image
    from iomm.evaluation.grid import image_grid, save_png
    from iomm.sampling import reconstruct

    ratios: list[float] = arguments.mask_ratio or [0.0, 0.5, 0.85, 1.0]
    reconstruction_command.check_ratios(ratios)
    config, encoders, system = open_generator(arguments.checkpoint, ema=not arguments.raw)
    image_1CHW = decode_image(arguments.image.read_bytes(), config.data.image_px)[None]
    keep = torch.cat(
        [keep_tokens(arguments.seed, torch.tensor([0]), encoders.mllm.image_tokens, r) for r in ratios]
    )
    pictures = reconstruct(
        system,
        encoders,
        image_1CHW.expand(len(ratios), -1, -1, -1),
        keep,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        method=arguments.method,
    )
    captions = ["the image", *(f"mask ratio {ratio:g}" for ratio in ratios)]
    sheet = image_grid(torch.cat((image_1CHW, pictures.cpu())), len(captions), captions)
    sys.stdout.write(f"{save_png(sheet, arguments.output)}\n")
    return 0


def _edit(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.generator import open_generator

    edit_command.check_settings(arguments)
    return edit_command.run(arguments, open_generator(arguments.checkpoint, ema=not arguments.raw))


def _report(arguments: argparse.Namespace) -> int:
    from iomm.evaluation.report import build_report

    sys.stdout.write(f"{build_report(arguments.run)}\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.hf import export_run
    from iomm.parallel.engine import DTYPES

    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    sys.stdout.write(f"{export_run(arguments.run, arguments.output, ema=not arguments.raw, dtype=dtype)}\n")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.hf import import_folder

    if arguments.set and arguments.config is None:
        raise UsageError("--set changes a configuration: name one with --config CONFIG.py.")
    config = None if arguments.config is None else load_config(arguments.config).override(arguments.set)
    imported = import_folder(arguments.folder, arguments.output, config=config)
    for note in imported.notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"{imported.checkpoint}\nstart from it with: --set train.init_from={arguments.output}\n")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from iomm.demo import run_demo

    return run_demo(arguments.out, arguments.fraction)


def _bench_prefix(arguments: argparse.Namespace) -> int:
    from iomm.bench.prefix import bench_prefix

    sys.stdout.write(bench_prefix(arguments.width, arguments.layers, arguments.batch, arguments.repeats))
    return 0


def _bench_mask(arguments: argparse.Namespace) -> int:
    from iomm.bench.mask import bench_mask

    sizes = (arguments.width, arguments.layers, arguments.batch, arguments.repeats)
    sys.stdout.write(bench_mask(arguments.mask_ratio, *sizes))
    return 0


def _bench_encoders(arguments: argparse.Namespace) -> int:
    from iomm.bench.encoders import bench_encoders

    config = load_config(arguments.config).override(arguments.set)
    sys.stdout.write(bench_encoders(config, arguments.repeats) or "")
    return 0


def _bench_fp8(arguments: argparse.Namespace) -> int:
    from iomm.bench.fp8 import bench_fp8

    sys.stdout.write(bench_fp8(load_config(arguments.config).override(arguments.set)))
    return 0


def _bench_data(arguments: argparse.Namespace) -> int:
    from iomm.bench.data import bench_data

    sizes = (arguments.images, arguments.large, arguments.side, arguments.rounds)
    sys.stdout.write(bench_data(*sizes))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    return plan_command.run(arguments, arguments.config and load_config(arguments.config))


def _shard(arguments: argparse.Namespace) -> int:
    if arguments.what != "encode":
        return shard_command.run(arguments)
    from iomm.training.encode import run

    return run(load_config(arguments.config).override(arguments.set))


def _evaluate_shapes(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.generator import open_generator

    shapes_command.check_evaluate_arguments(arguments)
    about = _about(arguments.checkpoint, ema=not arguments.raw)
    _, encoders, system = open_generator(arguments.checkpoint, ema=not arguments.raw)
    return shapes_command.evaluate(arguments, system, encoders, about)


def _evaluate_generate(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.generator import open_generator

    about = _about(arguments.checkpoint, ema=not arguments.raw)
    config, encoders, system = open_generator(arguments.checkpoint, ema=not arguments.raw)
    return benches_command.generate(arguments, config.data.image_px, system, encoders, about)


def _evaluate_reconstruction(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.folder import find, read_info
    from iomm.checkpoint.generator import open_generator

    reconstruction_command.check_ratios(arguments.mask_ratio or [])
    ema = read_info(find(arguments.checkpoint)).has_ema
    about = _about(arguments.checkpoint, ema=ema)
    if about["run_dir"] is None:
        raise UsageError(
            f"{arguments.checkpoint} lies by itself; the measurement is kept in a run's folder. Name a run, "
            "or a checkpoint in a run's checkpoints/."
        )
    opened = open_generator(arguments.checkpoint, ema=ema)
    return reconstruction_command.evaluate(arguments, Path(about["run_dir"]), about["step"], opened)


def _about(checkpoint: Path, *, ema: bool) -> dict[str, Any]:
    """What an evaluation's records say of the checkpoint; `run_dir` is None if no run's folder holds it."""
    from iomm.checkpoint.folder import find, read_info, run_of

    info, run_dir = read_info(find(checkpoint)), run_of(checkpoint)
    return {
        "run": info.config["name"],
        "run_dir": None if run_dir is None else str(run_dir),
        "step": info.step,
        "ema": ema,
    }


def _launch_slurm(arguments: argparse.Namespace) -> int:
    return launch_slurm.run(arguments, load_config(arguments.config).override(arguments.set))


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.distributed:
        from iomm.doctor.ranks import run

        config = None if arguments.config is None else load_config(arguments.config)
        return run(config if config is None else config.override(arguments.set))
    if arguments.config is not None or arguments.set:
        raise UsageError("--config and --set compare the ranks' settings: add --distributed.")
    from iomm.doctor import collect, render

    sys.stdout.write(render(collect()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
