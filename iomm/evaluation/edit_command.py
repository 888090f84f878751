"""`iomm edit`: what the command line says. Imports nothing heavy."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iomm.config import Config
    from iomm.encoders import Encoders
    from iomm.system import System

DESCRIPTION = "image + instruction -> edited image, by a model that was not trained to edit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `iomm edit`, beside the checkpoint's."""
    parser.add_argument("image", type=Path)
    parser.add_argument("instruction", nargs="+", help="one picture each")
    add_settings(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("edit.png"))


def add_settings(parser: "argparse._ActionsContainer") -> None:
    """How an edit is made."""
    parser.add_argument(
        "--mask-ratio", type=float, default=0.5, help="share of the image's patch tokens masked (default 0.5)"
    )
    parser.add_argument(
        "--image-guidance", type=float, default=1.5, help="guidance scale of the image; 1: none (default 1.5)"
    )
    parser.add_argument(
        "--text-guidance", type=float, default=3.0, help="of the instruction; 1: none (default 3)"
    )
    parser.add_argument(
        "--aux-prompt",
        action="store_true",
        help="the auxiliary prompt of training stands between instruction and image",
    )


def check_settings(arguments: argparse.Namespace) -> None:
    """Raises:
    ValueError: a mask ratio that is no share.
    """
    if not 0 <= arguments.mask_ratio <= 1:
        raise ValueError(f"--mask-ratio {arguments.mask_ratio} must lie in [0, 1].")


def run(arguments: argparse.Namespace, opened: "tuple[Config, Encoders, System]") -> int:
    """Edit an image with an opened checkpoint; the exit status.

    Raises:
        ValueError: no such image, or an instruction without tokens, or with too many.
    """
    import torch

    from iomm.conditioning.mask import keep_tokens
    from iomm.data.decode import decode_image
    from iomm.evaluation.grid import image_grid, save_png
    from iomm.sampling import edit

    config, encoders, system = opened
    image_1CHW = decode_image(arguments.image.read_bytes(), config.data.image_px)[None]
    number, tokens = len(arguments.instruction), encoders.mllm.image_tokens
    keep_1N = keep_tokens(arguments.seed, torch.tensor([0]), tokens, arguments.mask_ratio)
    pictures_BCHW = edit(
        system,
        encoders,
        image_1CHW.expand(number, -1, -1, -1),
        arguments.instruction,
        keep_1N.expand(number, -1),
        seed=arguments.seed,
        steps=arguments.steps,
        image_guidance=arguments.image_guidance,
        text_guidance=arguments.text_guidance,
        aux_prompt=arguments.aux_prompt,
        method=arguments.method,
    )
    captions = ["the image", *arguments.instruction]
    sheet = image_grid(torch.cat((image_1CHW, pictures_BCHW.cpu())), min(len(captions), 6), captions)
    sys.stdout.write(f"{save_png(sheet, arguments.output)}\n")
    return 0
