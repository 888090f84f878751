"""The velocity loss."""

import pytest
import torch

from iomm.flow.loss import velocity_loss


def test_loss_is_the_mean_square_of_each_sample_in_fp32():
    v = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]], dtype=torch.bfloat16)
    loss = velocity_loss(v, torch.zeros_like(v))
    assert loss.tolist() == [5.0, 0.0] and loss.dtype == torch.float32


def test_fp64_stays_fp64():
    assert velocity_loss(torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()).dtype == torch.float64


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        velocity_loss(torch.zeros(2, 1, 4), torch.zeros(2, 3, 4))
