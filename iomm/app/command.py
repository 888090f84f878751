"""`iomm app`: what the command line says."""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

DESCRIPTION = (
    "a page in the browser: prompt -> image, masked image -> reconstruction, image + instruction -> edit"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm app`. Imports nothing heavy."""
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their EMA")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: whoever reaches this machine may use the page (default "
        "127.0.0.1: this machine only)",
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free (default 7860)")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted; the exit status. What is uploaded lies in a folder that others cannot
    read and that goes with the page.

    Raises:
        ValueError: Gradio is not installed.
        OSError: as `serve`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "iomm app needs Gradio, which is not installed. Get it with: pip install 'iomm[app]'"
        )
    # Gradio's own place for uploads is /tmp/gradio, which others may read.
    with tempfile.TemporaryDirectory(prefix="iomm-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read on import
        signal.signal(signal.SIGTERM, _leave)
        _serve(arguments)
    return 0


def _leave(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


def _serve(arguments: argparse.Namespace) -> None:
    from iomm.app.page import build_page, serve
    from iomm.app.studio import Studio
    from iomm.checkpoint.generator import open_generator
    from iomm.checkpoint.sharded import find, read_info

    config, encoders, system = open_generator(arguments.checkpoint, ema=not arguments.raw)
    step = read_info(find(arguments.checkpoint)).step
    page = build_page(Studio(system, encoders), f"{config.name}, step {step}")
    sys.stderr.write(f"{serve(page, arguments.host, arguments.port)} (Ctrl-C ends it)\n")
    page.block_thread()
