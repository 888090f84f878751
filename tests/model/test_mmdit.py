"""The generator: parameter counts, positions, masks, dtypes, initial weights."""

import dataclasses

import pytest
import torch

from iomm.conditioning.adapter import ResidualQueryAdapter
from iomm.config import GeneratorConfig
from iomm.model.mmdit import unvaried_inputs
from iomm.presets import b, large
from tests.model.small_models import CONDITION_WIDTH, TOKEN_CHANNELS, inputs, make, perturbed

SMALL = GeneratorConfig(
    hidden_size=32,
    heads=2,
    double_blocks=2,
    single_blocks=1,
    rope_axes=(4, 6, 6),
    token_channels=TOKEN_CHANNELS,
    condition_width=CONDITION_WIDTH,
)


@pytest.mark.parametrize(("preset", "billions"), [(b, 1.6), (large, 2.7)])
def test_presets_have_the_papers_parameter_counts(preset, billions):
    with torch.device("meta"):
        model = make(preset("x", ["x.tar"]).generator, torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / (billions * 1e9) - 1) < 0.02


def test_the_adapter_has_the_papers_parameter_count_at_width_1536():
    with torch.device("meta"):
        adapter = ResidualQueryAdapter(1536, 256, 12)
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == 28.7


def test_the_output_has_the_shape_of_the_noisy_tokens_and_starts_at_zero():
    x, t, c, positions = inputs()
    out = make(SMALL)(x, t, c, positions)
    assert out.shape == x.shape
    assert out.abs().max() == 0


def test_samples_do_not_see_each_other():
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    together = model(x, t, c, positions)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], c[i : i + 1], positions)[0], together[i])


def test_condition_tokens_that_do_not_count_have_no_influence():
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    attend = torch.ones(3, 5, dtype=torch.bool)
    attend[:, 3:] = False
    masked = model(x, t, c, positions, attend)
    torch.testing.assert_close(masked, model(x, t, c[:, :3], positions))
    changed = torch.where(attend[..., None], c, torch.randn_like(c))
    torch.testing.assert_close(masked, model(x, t, changed, positions, attend))
    assert (masked - model(x, t, c, positions)).abs().max() > 1e-4


def test_condition_order_has_no_influence_and_image_position_has():
    # Condition tokens all sit at position 0; image tokens are told apart by rope only.
    model = perturbed(make(SMALL))
    x, t, c, positions = inputs()
    base = model(x, t, c, positions)
    torch.testing.assert_close(model(x, t, c.flip(1), positions), base)
    assert (model(x, t, c, positions.flip(0)) - base).abs().max() > 1e-4


@pytest.mark.parametrize("single_blocks", [0, 1])
def test_every_trained_parameter_gets_a_gradient(single_blocks):
    # A trained parameter without one would stall Megatron's overlapped gradient reduction.
    model = perturbed(make(dataclasses.replace(SMALL, single_blocks=single_blocks)))
    x, t, c, positions = inputs()
    model(x, t, c, positions).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or p.grad.abs().max() == 0] == []
    frozen = {name for name, p in model.named_parameters()} - trained.keys()
    unread = ("attention_out", "mlp", "norm.query")
    assert all(
        name.startswith(tuple(f"double_blocks.1.condition.{part}" for part in unread)) for name in frozen
    )
    assert bool(frozen) == (single_blocks == 0)


FLUX_DEV = dataclasses.replace(SMALL, pooled_width=6, guidance_embedding=True)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (SMALL, {"pooled_BP": torch.zeros(3, 6)}, "pooled_BP is given"),
        (SMALL, {"guidance_B": torch.ones(3)}, "guidance_B is given"),
        (FLUX_DEV, {"pooled_BP": torch.zeros(3, 6)}, "guidance_B is missing"),
        (FLUX_DEV, {"guidance_B": torch.ones(3)}, "pooled_BP is missing.*generator.pooled_width is set"),
    ],
)
def test_an_input_that_the_model_was_not_built_for_or_that_is_missing_is_refused(config, given, message):
    with pytest.raises(ValueError, match=message):
        make(config)(*inputs(), **given)


def test_inputs_that_no_run_varies_are_constants_of_the_models_that_have_them():
    assert unvaried_inputs(SMALL, 3, torch.device("cpu")) == {}
    constants = unvaried_inputs(FLUX_DEV, 3, torch.device("cpu"))
    assert torch.equal(constants["pooled_BP"], torch.zeros(3, 6))
    assert torch.equal(constants["guidance_B"], torch.full((3,), 3.5))
    model = perturbed(make(FLUX_DEV))
    base = model(*inputs(), **constants)
    for name in constants:
        changed = constants | {name: constants[name] + 1}
        assert (model(*inputs(), **changed) - base).abs().max() > 1e-4


def test_initial_weights_depend_on_seed_and_name_only():
    first, again, other = (dict(make(SMALL, seed=s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    changed = [n for n in first if not torch.equal(first[n], other[n])]
    assert "double_blocks.0.image.qkv.weight" in changed and "out.weight" not in changed
    deeper = dict(make(dataclasses.replace(SMALL, double_blocks=3)).named_parameters())
    assert all(torch.equal(first[n], deeper[n]) for n in first)


def test_bf16_stays_near_fp64():
    model, wide = perturbed(make(SMALL, dtype=torch.bfloat16)), perturbed(make(SMALL))
    with torch.no_grad():
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.copy_(p)
    x, t, c, positions = inputs()
    exact = wide(x, t, c, positions)
    out = model(x.bfloat16(), t, c.bfloat16(), positions)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
