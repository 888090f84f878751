"""The linear readout from states behind pictures to states behind captions."""

from pathlib import Path

import pytest
import torch

from examples.tiny.mllm_readout import CLASSES, labels, main, readout, roc_area
from iomm.evaluation.shapes.sampling import draw_pair
from iomm.evaluation.shapes.scene import COLOURS, SHAPES

MLLM = Path(__file__).parents[2] / "examples" / "tiny" / "mllm"


def test_the_roc_area_is_the_share_of_pairs_in_order_with_ties_counted_half() -> None:
    scores, there = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert roc_area(scores, there) == (1 + 1 + 0 + 0.5) / 4
    assert roc_area(scores, ~there) == 1 - roc_area(scores, there)


def test_what_a_caption_names_is_labelled_and_colours_count_only_where_one_is_named() -> None:
    pairs = [draw_pair(0, index) for index in range(60)]
    named_NC, counts_NC = labels(pairs)
    for pair, named_C, counts_C in zip(pairs, named_NC, counts_NC, strict=True):
        words = {name for name, is_named in zip(CLASSES, named_C.tolist(), strict=True) if is_named}
        # a class's name is in the text just where it is labelled; plurals begin with it
        assert words == {name for name in CLASSES if name in pair.prompt.text}
        assert counts_C[: len(SHAPES)].all() and counts_C[len(SHAPES) :].all() == bool(words & set(COLOURS))


def test_a_readout_carries_over_where_both_kinds_of_states_say_it_alike_and_not_where_they_do_not() -> None:
    noise = torch.Generator().manual_seed(0)
    named_NC = (torch.rand(600, len(CLASSES), generator=noise) < 0.3).float()
    counts_NC = torch.ones_like(named_NC, dtype=torch.bool)
    mixed_CF = torch.randn(len(CLASSES), 40, generator=noise)
    learn_NF = named_NC @ mixed_CF + 0.1 * torch.randn(600, 40, generator=noise)
    alike_NF = named_NC @ mixed_CF + 0.1 * torch.randn(600, 40, generator=noise)
    foreign_NF = named_NC @ torch.randn(len(CLASSES), 40, generator=noise)
    assert min(readout(learn_NF, alike_NF, named_NC, counts_NC)) > 0.95
    assert max(readout(learn_NF, foreign_NF, named_NC, counts_NC)) < 0.75


def test_the_table_has_a_row_for_each_way_and_the_shipped_captions_are_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(MLLM), "--pairs", "300"]) == 0
    rows = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["pictures", "pictures"],
        ["pictures", "captions"],
        ["captions", "captions"],
    ]
    shapes, colours = (float(number.strip(" |")) for number in rows[2][2:])
    assert shapes > 0.8 and colours > 0.8


def test_a_folder_without_weights_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model\.safetensors\. Train one: python -m"):
        main([str(tmp_path)])
