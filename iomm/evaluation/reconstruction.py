"""How much of an image comes back from a part of its tokens: PSNR against the mask ratio.

At ratio 1 nothing of the image is left, which is the null condition: what is not above its line was not taken
from the image. The masks are nested: a token that is shown at a ratio is shown at every lower one.

B images, R mask ratios, N patch tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from iomm.conditioning.mask import keep_tokens
from iomm.encoders import Encoders
from iomm.evaluation.bootstrap import interval_of_means
from iomm.evaluation.grid import image_grid, save_png
from iomm.evaluation.heldout import EVAL_SEED, psnr_db
from iomm.evaluation.scores import Reconstruction, read_reconstruction, reconstruction_path, write_json
from iomm.sampling import reconstruct
from iomm.system import System

RATIOS = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_SHOWN = 12  # images on the sheet
_AT_ONCE = 12  # images generated together


def measure(
    system: System,
    encoders: Encoders,
    image_BCHW: Tensor,
    index_B: Tensor,
    *,
    step: int,
    sampler_steps: int,
    ratios: Sequence[float] = RATIOS,
) -> tuple[Reconstruction, Tensor]:
    """Generate images from their own tokens at each mask ratio: (PSNR, pictures).

    The pictures are uint8 (R, B, 3, H, W) on the CPU; picture i starts from the same noise at every ratio.

    Args:
        image_BCHW: uint8 RGB.
        index_B: numbers of the images; the masks depend on them.
        step: of the weights, for the record.
        ratios: shares of patch tokens masked, in [0, 1].
    """
    tokens, original_BCHW = encoders.mllm.image_tokens, image_BCHW.cpu()
    rows = []
    for ratio in ratios:
        keep_BN = keep_tokens(EVAL_SEED, index_B, tokens, ratio)
        parts = [
            reconstruct(
                system,
                encoders,
                image_BCHW[first : first + _AT_ONCE].to(encoders.codec.device),
                keep_BN[first : first + _AT_ONCE],
                seed=EVAL_SEED,
                steps=sampler_steps,
                first=first,
            )
            for first in range(0, len(image_BCHW), _AT_ONCE)
        ]
        rows.append(torch.cat(parts).cpu())
    found = Reconstruction(
        step=step,
        images=len(original_BCHW),
        sampler_steps=sampler_steps,
        trained_mask_ratio=encoders.prefixes.config.mask_ratio,
        ratios=list(ratios),
        psnr_db=[interval_of_means([psnr_db(row, original_BCHW).double().numpy()]) for row in rows],
    )
    return found, torch.stack(rows)


def leave_reconstruction(
    run_dir: Path, found: Reconstruction, pictures_RBCHW: Tensor, image_BCHW: Tensor
) -> Path:
    """Keep the measurement in RUN/reconstruction/, and its pictures in RUN/samples/ if it is the one that the
    report shows; the former's file."""
    path = write_json(reconstruction_path(run_dir, found), asdict(found))
    if read_reconstruction(run_dir, []) != found:
        return path
    shown = min(_SHOWN, len(image_BCHW))
    rows = torch.cat((image_BCHW.cpu()[None], pictures_RBCHW))[:, :shown]
    captions = [
        text for text in ["the image", *(f"mask ratio {r:g}" for r in found.ratios)] for _ in range(shown)
    ]
    sheet = image_grid(rows.flatten(0, 1), shown, captions, cell_px=96)
    save_png(sheet, run_dir / f"samples/step_{found.step:06d}_by_mask_ratio.png")
    return path
