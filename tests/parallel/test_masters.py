"""Parts of weights as boxes of the whole."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from iomm.parallel.masters import Piece, boxes, copy_boxes, sharded_pieces
from iomm.parallel.mesh import Mesh


@given(st.data())
def test_boxes_hold_each_element_of_the_range_once_and_in_order(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbers = torch.arange(count).view(shape)
    found = boxes(shape, start, stop)
    cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].reshape(-1) for box in found]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *cut]), torch.arange(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_a_whole_weight_is_one_box() -> None:
    assert boxes((4, 3), 0, 12) == [((0, 0), (4, 3))]
    assert boxes((7,), 2, 5) == [((2,), (3,))]
    assert boxes((4, 3), 5, 5) == []


def test_what_a_checkpoint_is_told_about_a_piece_is_filled_back_into_it(mesh: Mesh) -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    piece = Piece("w", weight, 2, 10, weight.detach().view(-1)[2:10], {}, 1)
    average = torch.arange(8.0)
    told = sharded_pieces({"w": average}, [piece], "ema.", mesh)["w"]
    assert [(s.key, s.global_offset, s.local_shape) for s in told] == [
        ("ema.w", (0, 2), (1, 1)),
        ("ema.w", (1, 0), (2, 3)),
        ("ema.w", (3, 0), (1, 1)),
    ]
    assert all(s.global_shape == (4, 3) and s.replica_id == (0, 0, 0) for s in told)
    copy_boxes({"w": average}, {"w": [s.data + 1 for s in told if s.data is not None]})
    assert torch.equal(average, torch.arange(8.0) + 1)
