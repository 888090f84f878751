"""Does the tiny MLLM say the same of a picture and of its caption? A linear readout tells.

    python -m examples.tiny.mllm_readout examples/tiny/mllm     (repository root, a minute of one core)

Image-only training teaches the generator to read the MLLM's states behind a picture; at the end it is given
those behind a caption. So: pairs of the shapes world, each once as [ aux prompt | 16 patch tokens | queries ]
and once as [ caption | queries ], with the same random queries. A linear readout (ridge regression) of which
shapes and colours are there is learned on the states at the queries. Learned on pictures and tested on
captions, it has an area under the ROC curve of 1 if both say it alike and of 0.5 if they have nothing in
common.

N pairs, Q queries, D width, F = Q D features, C classes (shapes, then colours).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from examples.tiny.mllm_data import pixels
from examples.tiny.mllm_model import image_prefix, run_language_model
from examples.tiny.mllm_report import TinyMllm, load_tiny_mllm
from iomm.evaluation.shapes.sampling import Pair, draw_pair
from iomm.evaluation.shapes.scene import COLOURS, SHAPES, render

CLASSES = (*SHAPES, *COLOURS)
QUERIES = 8
RIDGE = 300.0  # added to the diagonal; features have variance 1
BATCH = 100


@torch.no_grad()
def states(mllm: TinyMllm, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output states at the queries behind each pair's picture and behind its caption, both (N, F)."""
    words_VD = mllm.model.get_input_embeddings().weight
    noise = torch.Generator().manual_seed(0)
    query_QD = torch.randn(QUERIES, words_VD.shape[1], generator=noise) * words_VD.std()

    def read(prefix_BLD: torch.Tensor) -> torch.Tensor:
        embeds_BLD = torch.cat([prefix_BLD, query_QD.expand(len(prefix_BLD), -1, -1)], dim=1)
        states_BLD, _ = run_language_model(mllm.model, embeds_BLD, mllm.align_layer)
        return states_BLD[:, -QUERIES:].flatten(1)

    pictures, captions = [], []
    for first in range(0, len(pairs), BATCH):
        some = pairs[first : first + BATCH]
        pixels_BCHW = pixels([Image.fromarray(render(pair.scene)) for pair in some])
        pictures.append(read(image_prefix(mllm.model, pixels_BCHW, mllm.prompt_ids)))
        for pair in some:
            ids = mllm.tokenizer.encode(pair.prompt.text, add_special_tokens=False)
            captions.append(read(words_VD[torch.tensor(ids)][None]))
    return torch.cat(pictures), torch.cat(captions)


def labels(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each caption names, (N, C) of 0 and 1, and whether it says anything of the class's kind, bool."""
    named_NC = torch.zeros(len(pairs), len(CLASSES))
    for row, pair in enumerate(pairs):
        for wanted in pair.prompt.facts.wanted:
            for word in filter(None, (wanted.shape, wanted.colour)):
                named_NC[row, CLASSES.index(word)] = 1
    of_shape_C = torch.tensor([name in SHAPES for name in CLASSES])
    names_colours_N = (named_NC[:, ~of_shape_C] > 0).any(dim=1)
    return named_NC, of_shape_C[None] | names_colours_N[:, None]


def roc_area(score_N: torch.Tensor, is_there_N: torch.Tensor) -> float:
    """Chance that a sample with the class scores higher than one without it; nan without either kind."""
    there, absent = score_N[is_there_N], score_N[~is_there_N]
    higher = (there[:, None] > absent).double() + 0.5 * (there[:, None] == absent).double()
    return higher.mean().item()


def readout(
    learn_NF: torch.Tensor, test_NF: torch.Tensor, named_NC: torch.Tensor, counts_NC: torch.Tensor
) -> tuple[float, float]:
    """Mean ROC area over shapes and over colours, learned on the first two thirds of the pairs as `learn_NF`
    shows them, tested on the rest as `test_NF` does."""
    cut = 2 * len(learn_NF) // 3
    mean_F, std_F = learn_NF[:cut].mean(dim=0), learn_NF[:cut].std(dim=0) + 1e-3

    def features(states_NF: torch.Tensor) -> torch.Tensor:
        scaled = (states_NF - mean_F) / std_F
        return torch.cat([scaled, torch.ones(len(scaled), 1)], dim=1).double()

    x_NF = features(learn_NF[:cut])
    gram_FF = x_NF.T @ x_NF + RIDGE * torch.eye(x_NF.shape[1], dtype=torch.float64)
    weight_FC = torch.linalg.solve(gram_FF, x_NF.T @ named_NC[:cut].double())
    score_NC = features(test_NF[cut:]) @ weight_FC
    areas = [
        roc_area(score_NC[rows, column], named_NC[cut:][rows, column] > 0)
        for column, rows in enumerate(counts_NC[cut:].T)
    ]
    shapes, colours = torch.tensor(areas).split([len(SHAPES), len(COLOURS)])
    return shapes.nanmean().item(), colours.nanmean().item()


def main(arguments: list[str]) -> int:
    """Prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mllm", type=Path, nargs="+", help="folders as train_mllm writes them")
    parser.add_argument("--pairs", type=int, default=1500)
    options = parser.parse_args(arguments)
    pairs = [draw_pair(0, index) for index in range(options.pairs)]
    named_NC, counts_NC = labels(pairs)
    sys.stdout.write("| MLLM | learned on | tested on | shapes | colours |\n|---|---|---|---|---|\n")
    for folder in options.mllm:
        picture_NF, caption_NF = states(load_tiny_mllm(folder), pairs)
        for learned, tested, learn_NF, test_NF in (
            ("pictures", "pictures", picture_NF, picture_NF),
            ("pictures", "captions", picture_NF, caption_NF),
            ("captions", "captions", caption_NF, caption_NF),
        ):
            shapes, colours = readout(learn_NF, test_NF, named_NC, counts_NC)
            sys.stdout.write(f"| {folder} | {learned} | {tested} | {shapes:.2f} | {colours:.2f} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
