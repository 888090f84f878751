"""Checkpoints of iomm <-> folders in the Hugging Face layout.

    python tools/convert_checkpoint.py to-hf RUN FOLDER [--raw] [--dtype bf16]
    python tools/convert_checkpoint.py from-hf FOLDER RUN [--config CONFIG.py [--set A.B=VALUE]]
    python tools/convert_checkpoint.py inspect RUN_OR_FOLDER
    python tools/convert_checkpoint.py verify FOLDER RUN [--raw] [--hashes-only]

The first two are `iomm export` and `iomm import`. `verify` ends with status 1 if the two are not equal, and
writes FOLDER.verify.json with the hash of every tensor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from iomm import cli


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    export, import_ = commands.add_parser("to-hf"), commands.add_parser("from-hf")
    for command, names in ((export, ("RUN", "FOLDER")), (import_, ("FOLDER", "RUN"))):
        command.add_argument("source", metavar=names[0])
        command.add_argument("target", metavar=names[1])
    commands.add_parser("inspect").add_argument("path", type=Path)
    verify = commands.add_parser("verify")
    verify.add_argument("folder", type=Path)
    verify.add_argument("run", type=Path)
    verify.add_argument("--raw", action="store_true", help="the run's weights themselves, not their EMA")
    verify.add_argument("--hashes-only", action="store_true", help="compute no outputs: less memory and time")
    arguments, options = parser.parse_known_args(argv)
    if arguments.command in ("to-hf", "from-hf"):
        name = "export" if arguments.command == "to-hf" else "import"
        return cli.main([name, arguments.source, "-o", arguments.target, *options])
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    return _look(arguments)


def _look(arguments: argparse.Namespace) -> int:
    from iomm.checkpoint.hf import CheckpointError, inspect, verify

    try:
        if arguments.command == "inspect":
            sys.stdout.write(inspect(arguments.path))
            return 0
        ema = False if arguments.raw else None
        report = verify(arguments.folder, arguments.run, ema=ema, outputs=not arguments.hashes_only)
    except (CheckpointError, ValueError, OSError) as error:
        sys.stderr.write(f"convert_checkpoint: error: {error}\n")
        return 1
    sys.stdout.write(report.text())
    return 0 if report.equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
