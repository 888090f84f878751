"""A generator in chunks is the generator, through a pipeline's hand-overs and with activations recomputed."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from iomm.config import ParallelConfig
from iomm.model import recompute
from iomm.model.packed import local_length
from iomm.model.padding import padded
from tests.model.small_models import (
    FLUX,
    Z_IMAGE,
    copy_weights,
    inputs,
    make,
    perturbed,
    relay,
    saved_bytes,
    stages,
)

FAMILIES = pytest.mark.parametrize("config", [FLUX, Z_IMAGE], ids=["flux", "z_image"])
RAGGED = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def _whole(config, given, weighting):
    """Model, output, and gradients that `weighting` asks for."""
    model = perturbed(make(config))
    out = model(*given)
    (out * weighting).sum().backward()
    return model, out.detach()


@FAMILIES
@pytest.mark.parametrize("attend", [None, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize(("pp", "virtual", "mode"), [(3, 1, "none"), (1, 1, "selective"), (1, 3, "full")])
def test_chunks_one_after_the_other_equal_the_whole_model_in_value_and_gradient(
    config, attend, pp, virtual, mode
):
    x, t, condition, positions = inputs()
    weighting = torch.randn(x.shape, dtype=x.dtype)
    given = x, t, condition.clone().requires_grad_(), positions, attend
    whole, out = _whole(config, given, weighting)
    parts = [
        copy_weights(make(config, chunks=chunks, parallel=ParallelConfig(recompute=mode)), whole)
        for chunks in stages(config, pp, virtual)
    ]
    in_chunks = x, t, condition.clone().requires_grad_(), positions, attend
    torch.testing.assert_close(relay(parts, stages(config, pp, virtual), in_chunks, weighting), out)
    torch.testing.assert_close(in_chunks[2].grad, given[2].grad)
    held = {name: weight for part in parts for name, weight in part.named_parameters()}
    assert len(held) == sum(len(list(part.parameters())) for part in parts)
    assert held.keys() == dict(whole.named_parameters()).keys()
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(held[name].grad, weight.grad)


@FAMILIES
def test_members_of_all_chunks_are_the_model_each_weight_once_and_by_its_name(config):
    model = make(config)
    held = []
    for chunks in stages(config, 2, 1):
        for chunk in chunks:
            view = nn.Module()
            for name, member in model.members(chunk).items():
                setattr(view, name, member)
            held += list(view.named_parameters())
    weights = dict(model.named_parameters())
    assert len(held) == len(weights)
    assert all(weight is weights[name] for name, weight in held)


@FAMILIES
def test_recomputation_keeps_less_the_more_it_computes_again(config, monkeypatch):
    # Selectively kept results show up in the count only if asked to.
    honest = functools.partial(checkpoint, respect_saved_tensors_hooks=True)
    monkeypatch.setattr(recompute, "checkpoint", honest)
    given = inputs(rows=8, columns=8, t=32)
    saved = {
        mode: saved_bytes(make(config, parallel=ParallelConfig(recompute=mode)), given)
        for mode in ("none", "selective", "full")
    }
    assert saved["full"] < saved["selective"] / 3 and saved["selective"] < 0.6 * saved["none"], saved


def test_condition_rows_behind_the_padding_change_nothing(monkeypatch):
    # As where 32 does not divide over the ranks of a sequence.
    model, given = perturbed(make(Z_IMAGE)), (*inputs(), RAGGED)
    expected, unmasked = model(*given), model(*inputs())
    monkeypatch.setattr(model, "_condition_length", lambda tokens: padded(tokens) + 4)
    torch.testing.assert_close(model(*given), expected)
    torch.testing.assert_close(model(*inputs()), unmasked)


def test_image_tokens_that_do_not_divide_over_the_ranks_of_a_sequence_are_refused():
    assert local_length(12, 3, "image") == 4
    with pytest.raises(
        ValueError, match=r"10 image tokens are not divisible by parallel.tp = 3.*Set parallel"
    ):
        local_length(10, 3, "image")
