"""The single-stream generator: parameter count, padding, masks, positions, initial weights, settings.

That it equals diffusers' class is tests/checkpoint/test_z_image_parity.py.
"""

import dataclasses

import pytest
import torch

from iomm.config import GeneratorConfig
from iomm.model.padding import padded
from iomm.presets import xl
from tests.model.small_models import CONDITION_WIDTH, TOKEN_CHANNELS, inputs, make, perturbed

SMALL = GeneratorConfig(
    family="z_image",
    hidden_size=32,
    heads=2,
    double_blocks=0,
    single_blocks=2,
    refiner_blocks=1,
    rope_axes=(4, 6, 6),
    rope_theta=256.0,
    token_channels=TOKEN_CHANNELS,
    condition_width=CONDITION_WIDTH,
)


RAGGED = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_the_xl_preset_has_the_papers_parameter_count():
    with torch.device("meta"):
        model = make(xl("x", ["x.tar"]).generator, torch.bfloat16)
    assert abs(sum(p.numel() for p in model.parameters()) / 6e9 - 1) < 0.03


def test_the_output_has_the_shape_of_the_noisy_tokens_and_starts_at_zero():
    x, t, c, positions = inputs()
    out = make(SMALL)(x, t, c, positions)
    assert out.shape == x.shape
    assert out.abs().max() == 0


@pytest.mark.parametrize("attend", [None, RAGGED], ids=["equal", "ragged"])
def test_samples_do_not_see_each_other(attend):
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    together = model(x, t, c, positions, attend)
    for i in range(3):
        mine = None if attend is None else attend[i : i + 1]
        alone = model(x[i : i + 1], t[i : i + 1], c[i : i + 1], positions, mine)
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("count", [33, 40])  # rows whose own padding ends before the batch's, and at it
def test_condition_tokens_that_do_not_count_have_no_influence(count):
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs(t=70)
    attend = torch.zeros(3, 70, dtype=torch.bool)
    attend[:, 10 : 10 + count] = True
    attend[2, 20:] = False
    masked = model(x, t, c, positions, attend)
    for i, part in enumerate((c[:1, 10 : 10 + count], c[1:2, 10 : 10 + count], c[2:, 10:20])):
        one = slice(i, i + 1)
        torch.testing.assert_close(masked[one], model(x[one], t[one], part, positions))
    changed = torch.where(attend[..., None], c, torch.randn_like(c))
    assert torch.equal(masked, model(x, t, changed, positions, attend))
    assert (masked - model(x, t, c, positions)).abs().max() > 1e-4


def test_a_mask_that_lets_everything_through_changes_nothing():
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    attend = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(model(x, t, c, positions, attend), model(x, t, c, positions))


def test_a_sample_without_any_condition_token_is_finite_and_so_are_its_gradients():
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    attend = RAGGED.clone()
    attend[1] = False
    out = model(x, t, c, positions, attend)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_condition_order_and_image_position_have_an_influence():
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    base = model(x, t, c, positions)
    assert (model(x, t, c.flip(1), positions) - base).abs().max() > 1e-4
    assert (model(x, t, c, positions.flip(0)) - base).abs().max() > 1e-4


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("attend", [None, RAGGED], ids=["equal", "ragged"])
def test_every_trained_parameter_gets_a_gradient(attend, affine):
    # A trained parameter without one would stall Megatron's overlapped gradient reduction.
    model = perturbed(make(dataclasses.replace(SMALL, norm_affine=affine)))
    x, t, c, positions = inputs()
    model(x, t, c, positions, attend).square().sum().backward()
    assert all(p.requires_grad for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_pad_tokens_get_a_zero_gradient_where_nothing_is_padded():
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs(samples=1, rows=4, columns=8, t=32)
    model(x, t, c, positions).square().sum().backward()
    for token in (model.image_pad, model.condition_pad):
        assert token.grad is not None
        assert token.grad.abs().max() == 0


def test_parameter_free_norms_equal_norms_with_weights_of_one():
    with_weights = perturbed(make(SMALL))
    free = make(dataclasses.replace(SMALL, norm_affine=False))
    weights = dict(with_weights.named_parameters())
    block_norms = {n for n in weights if "_norm_" in n}
    assert weights.keys() - dict(free.named_parameters()).keys() == block_norms
    with torch.no_grad():
        for name in block_norms:
            weights[name].fill_(1.0)
        for name, p in free.named_parameters():
            p.copy_(weights[name])
    assert torch.equal(free(*inputs()), with_weights(*inputs()))


def test_initial_weights_depend_on_seed_and_name_only():
    first, again, other = (dict(make(SMALL, seed=s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    changed = {n for n in first if not torch.equal(first[n], other[n])}
    assert {"single_blocks.0.qkv.weight", "image_pad", "condition_pad"} <= changed
    assert not {"out.weight", "out_modulation.weight", "single_blocks.0.modulation.weight"} & changed


def test_bf16_stays_near_fp64():
    model, wide = perturbed(make(SMALL, dtype=torch.bfloat16)), perturbed(make(SMALL))
    with torch.no_grad():
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.copy_(p)
    x, t, c, positions = inputs()
    exact = wide(x, t, c, positions, RAGGED)
    out = model(x.bfloat16(), t, c.bfloat16(), positions, RAGGED)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_streams_are_padded_to_multiples_of_32():
    assert [padded(n) for n in (0, 1, 31, 32, 33)] == [0, 32, 32, 32, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(double_blocks=2), r"double_blocks 2 does not fit generator\.family=z_image, which has it at 0"),
        (dict(mlp_ratio=3.0), r"mlp_ratio 3\.0 does not fit generator\.family=z_image, which has it at 4"),
        (dict(token_channels=6), r"token_channels 6 is no multiple of 4.*codec\.patch=2"),
        (dict(family="flux"), r"refiner_blocks 1 does not fit generator\.family=flux, which has it at 0"),
        (
            dict(family="flux", refiner_blocks=0, norm_affine=False),
            r"norm_affine False does not fit generator\.family=flux, which has it at True.*other family",
        ),
    ],
)
def test_settings_of_the_other_family_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
