"""`iomm launch slurm`: fills in the launch script for a run, checks what can be checked, and submits it."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from iomm.checkpoint.folder import private_folder
from iomm.config import Config
from iomm.launch.script import find_script, render

DESCRIPTION = "put a training run on a SLURM cluster: fill in examples/slurm/train.sbatch and submit it"
SCRIPT = "slurm.sbatch"  # in the run's folder: what was submitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; those that are left out stay as examples/slurm/train.sbatch has them."""
    parser.add_argument("config", type=Path, help="a Python file with a function config() -> Config")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="as of iomm train")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="one rank each (default 8)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--time", help="limit of one job, as sbatch writes it (default 24:00:00)")
    parser.add_argument("--dependency", help="as of sbatch, for example afterok:JOB")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="any other option of sbatch, for example qos=long; may be repeated",
    )
    parser.add_argument(
        "--python", help="interpreter on the nodes (default: this one; python3 in a container)"
    )
    parser.add_argument("--container-image", help="pyxis/enroot image, for example iomm.sqsh")
    parser.add_argument("--container-mounts", help="folders it sees beside this one: /data:/data,...")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Submit `config`, which `arguments` name; prints the job's number and where its log will be.

    Raises:
        ValueError: numbers that do not fit each other, no sbatch here, or sbatch refuses.
    """
    check_ranks(config, arguments.nodes * arguments.gpus_per_node)
    script = fill_in(arguments, config)
    if arguments.dry_run:
        sys.stdout.write(script)
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not on the PATH: this machine is no login node of a SLURM cluster. Run the command "
            "there, or print the script with --dry-run."
        )
    private_folder(config.run_dir)
    file = config.run_dir / SCRIPT
    file.write_text(script, encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refused {file}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]  # a federation adds ;CLUSTER
    log = config.run_dir / f"slurm-{job}.out"
    sys.stdout.write(
        f"submitted job {job}\nlog: {log}\nscript: {file}\nlook at it with: iomm status {config.run_dir}\n"
    )
    return 0


def fill_in(arguments: argparse.Namespace, config: Config) -> str:
    """The text of the batch script for this run."""
    options: dict[str, str | None] = {
        "job-name": config.name,
        "nodes": str(arguments.nodes),
        "gpus-per-node": str(arguments.gpus_per_node),
        "output": str(config.run_dir / "slurm-%j.out"),
    }
    for name in ("partition", "account", "time", "dependency"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    for option in arguments.sbatch:
        name, equals, value = option.removeprefix("--").partition("=")
        options[name] = value if equals else None
    in_container = arguments.container_image is not None
    variables = {"PYTHON": arguments.python or ("python3" if in_container else sys.executable)}
    if in_container:
        variables["CONTAINER_IMAGE"] = arguments.container_image
    if arguments.container_mounts is not None:
        variables["CONTAINER_MOUNTS"] = arguments.container_mounts
    settings = [word for setting in arguments.set for word in ("--set", setting)]
    text = find_script("train.sbatch").read_text(encoding="utf-8")
    return render(text, options, variables, [str(arguments.config), *settings])


def check_ranks(config: Config, ranks: int) -> None:
    """What a queue of hours would end in otherwise: a number of GPUs on which the run cannot start.

    Raises:
        ValueError: the layout or the global batch does not fit `ranks`.
    """
    if ranks < 1:
        raise ValueError(
            f"{ranks} GPUs cannot train anything. Give --nodes and --gpus-per-node of at least 1."
        )
    model, train = config.parallel.tp * config.parallel.pp, config.train
    if ranks % model:
        raise ValueError(
            f"{ranks} GPUs are not divisible by tp*pp = {config.parallel.tp}*{config.parallel.pp} = {model}. "
            "Change --nodes, --gpus-per-node, parallel.tp or parallel.pp."
        )
    across = train.micro_batch_images * (ranks // model)
    if train.global_batch_images % across:
        raise ValueError(
            f"train.global_batch_images {train.global_batch_images} is not divisible by micro-batch * "
            f"data-parallel size = {train.micro_batch_images}*{ranks // model} = {across}. "
            "Change the number of GPUs, or --set train.micro_batch_images."
        )
