"""`iomm plan`: what the command line says, and what is printed."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iomm.config import Config
    from iomm.plan.step import Estimate
    from iomm.plan.tables import Table

PRESETS = {"b": "b", "l": "large", "xl": "xl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options. Imports nothing heavy."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", type=Path, help="a Python file with a function config() -> Config")
    what.add_argument("--preset", choices=sorted(PRESETS), help="instead of a configuration file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpu", default="h800", help="h100, h200 or h800 (default)")
    parser.add_argument(
        "--network-gbit", type=float, default=3200.0, help="of a node of 8 GPUs, Gbit/s (default 3200)"
    )
    parser.add_argument("--global-batch", type=int, help="images of a step (default: the configuration's)")
    parser.add_argument("--px", type=int, help="side of the image (default: the configuration's)")
    parser.add_argument(
        "--layout",
        default="config",
        help="config (default): the configuration's; auto: the fastest feasible one; or for instance "
        "tp=2,sp=true,pp=4,vpp=2,micro=8,recompute=full,encoders=shared, of which auto fills in the rest: "
        "auto,tp=2",
    )
    parser.add_argument("--images", type=float, help="images to train on (default: steps x global batch)")
    parser.add_argument(
        "--distinct-images", type=float, help="of them different (default: all); caches hold these"
    )
    parser.add_argument("--price-per-gpu-hour", type=float, help="in any currency")
    parser.add_argument("--mask-mode", choices=["zero", "hide", "drop"])
    parser.add_argument("--fp8", choices=["none", "delayed", "current", "blockwise"])
    parser.add_argument("--recompute", choices=["none", "selective", "full"])
    parser.add_argument("--cache", help="encoders whose outputs are on disk: none, vae, vit or vae,vit")
    parser.add_argument(
        "--kernels",
        choices=["fused", "eager"],
        default="fused",
        help="element-wise operators (default fused)",
    )
    parser.add_argument("--levers", action="store_true", help="also what each design choice brings")
    parser.add_argument(
        "--sources", action="store_true", help="also the published runs behind the efficiencies"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as data")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the plan as Markdown")


def run(arguments: argparse.Namespace, config: "Config | None") -> int:
    """Make the plan and print it.

    Args:
        config: of the configuration file; None: `--preset`.
    Raises:
        ValueError: settings, sizes or layouts that do not fit.
    """
    from iomm.plan.report import to_data
    from iomm.plan.tables import to_markdown, to_text

    made, tables = plan(arguments, config)
    sys.stdout.write(to_text(tables))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(to_data(made, tables), indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(_heading(made) + to_markdown(tables))
    return 0


def plan(arguments: argparse.Namespace, config: "Config | None") -> "tuple[Estimate, list[Table]]":
    """The estimate that was asked for, and every table that is shown."""
    from iomm.plan import calibration, comparisons, levers
    from iomm.plan.hardware import Cluster, find_gpu
    from iomm.plan.layouts import parse_layout, rank, with_layout
    from iomm.plan.report import plan_tables
    from iomm.plan.step import estimate
    from iomm.plan.workload import workload

    config = _config(arguments, config)
    cluster = Cluster(gpu=find_gpu(arguments.gpu), gpus=arguments.gpus, network_gbit=arguments.network_gbit)
    cached = None if arguments.cache is None else frozenset(arguments.cache.split(",")) - {"none", ""}
    work = workload(config, fused=arguments.kernels == "fused", cached=cached)
    fitted = calibration.fit()
    tables: list[Table] = []
    if arguments.layout.split(",")[0] == "auto":
        fixed = parse_layout(arguments.layout.removeprefix("auto").lstrip(","))
        fixed |= {} if arguments.recompute is None else {"recompute": arguments.recompute}
        ranked = rank(work, cluster, fitted, fixed)
        tables += comparisons.ranking(ranked)
        if not ranked.feasible:
            raise ValueError(
                f"no layout fits {cluster.gpu.name}: the smallest needs "
                f"{min(m.peak_bytes for m in ranked.too_large) / 2**30:.0f} GiB. More GPUs, a smaller "
                "micro-batch or full recompute make room."
            )
        made = ranked.feasible[0]
    else:
        layout = {} if arguments.layout == "config" else parse_layout(arguments.layout)
        made = estimate(with_layout(work, layout), cluster, fitted)
    images = arguments.images or float(config.train.steps * config.train.global_batch_images)
    distinct = arguments.distinct_images or images
    tables += plan_tables(made, fitted, images, distinct, arguments.price_per_gpu_hour)
    if arguments.levers:
        levels = levers.ladder(made.work, cluster, fitted, calibration.spread())
        tables += comparisons.lever_tables(levels, fitted)
    if arguments.sources:
        tables += comparisons.calibration_tables()
    return made, tables


def _config(arguments: argparse.Namespace, given: "Config | None") -> "Config":
    """The configuration with the options applied."""
    from iomm import presets

    config: Config = given or getattr(presets, PRESETS[arguments.preset])(
        f"iomm-{arguments.preset}", images=("images",)
    )
    config = config.override(arguments.set)
    changes = {
        "train.global_batch_images": arguments.global_batch,
        "data.image_px": arguments.px,
        "condition.mask_mode": arguments.mask_mode,
        "fp8.recipe": arguments.fp8,
        "parallel.recompute": arguments.recompute,
    }
    return config.override([f"{key}={value}" for key, value in changes.items() if value is not None])


def _heading(made: "Estimate") -> str:
    config, cluster = made.work.config, made.cluster
    return (
        f"# Plan of {config.name}: {cluster.gpus} {cluster.gpu.name.upper()}, {config.data.image_px} px, "
        f"global batch {config.train.global_batch_images}\n\n"
        f"`{shlex.join(_shown(sys.argv))}`\n\nEvery rate is predicted, none was measured on a GPU by us.\n\n"
    )


def _shown(argv: Sequence[str]) -> list[str]:
    return ["iomm", *argv[1:]]
