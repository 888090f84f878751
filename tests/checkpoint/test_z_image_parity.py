"""Our single-stream generator and diffusers' `ZImageTransformer2DModel`, with weights mapped by the table of
names: the same numbers, forward and backward.

fp32 compares with the stock class as it is. The stock class computes its rotation, its RMSNorms' variance and
its time sinusoids in fp32 whatever the model's dtype, so two fp64 models would agree to 1e-6 only. `in_fp64`
lifts those casts in theirs, for the time of the call, and changes nothing of ours.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from iomm.checkpoint.names import family_table, our_config, their_config
from iomm.config import GeneratorConfig
from iomm.flow.path import grid_positions, patchify, unpatchify
from iomm.flow.sampler import Guided, sample
from iomm.presets import xl
from tests.model.small_models import make

CONFIG = GeneratorConfig(
    family="z_image",
    hidden_size=48,
    heads=2,
    double_blocks=0,
    single_blocks=2,
    refiner_blocks=2,
    rope_axes=(8, 8, 8),
    rope_theta=256.0,
    condition_width=20,
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest value
# Published with Z-Image-Turbo.
PUBLISHED = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": "0.36.0.dev0",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    rows: int  # of tokens
    columns: int
    tokens: int  # of the condition
    ragged: bool = False


CASES = [
    Case(1, 1, 1, 1),
    Case(3, 3, 5, 7),
    Case(1, 4, 8, 32),  # nothing to pad
    Case(3, 7, 5, 33),
    Case(3, 3, 5, 70, ragged=True),
    Case(1, 5, 3, 9, ragged=True),
]


def stock(config=CONFIG, dtype=torch.float32):
    """Their class from our config.json, with random weights."""
    torch.manual_seed(0)
    theirs = ZImageTransformer2DModel.from_config(their_config(config))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
    logging.disable(logging.WARNING)  # says that `to` is not `torch_dtype`; there is nothing to keep in fp32
    try:
        return theirs.to(dtype)
    finally:
        logging.disable(logging.NOTSET)


def fill_ours(theirs, config=CONFIG):
    """Our model with their weights."""
    dtype = theirs.x_pad_token.dtype
    ours, table, weights = make(config, dtype), family_table(config), theirs.state_dict()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(table.to_ours(name, weights.__getitem__))
    return ours


def fill_theirs(ours, config):
    theirs, table = stock(config, ours.image_pad.dtype), family_table(config)
    weights = dict(ours.named_parameters())
    theirs.load_state_dict({name: table.to_theirs(name, weights.__getitem__) for name in table.theirs})
    return theirs


def inputs(case: Case, dtype=torch.float64, config=CONFIG):
    """x_t, t, condition, attend, and a random direction in which outputs are differentiated."""
    torch.manual_seed(case.tokens)
    length = case.rows * case.columns
    x = torch.randn(case.batch, length, config.token_channels, dtype=dtype, requires_grad=True)
    condition = torch.randn(case.batch, case.tokens, config.condition_width, dtype=dtype, requires_grad=True)
    attend = None
    if case.ragged:
        share = torch.tensor([0.9, 0.3, 0.6])[: case.batch, None]
        attend = torch.rand(case.batch, case.tokens) < share
        attend[:, 1] = True
    t = torch.rand(case.batch, dtype=dtype)
    return x, t, condition, attend, torch.randn(case.batch, length, config.token_channels, dtype=dtype)


def run_theirs(model, case: Case, x, t, condition, attend):
    """Their model in our terms: our tokens, our t, our velocity."""
    latents = unpatchify(x, 2, case.rows, case.columns)[:, :, None]
    captions = [c if attend is None else c[attend[i]] for i, c in enumerate(condition)]
    out = model(list(latents.unbind()), 1 - t, captions, return_dict=False)[0]
    return -patchify(torch.stack(out)[:, :, 0], 2)


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    def rms_norm(self, x):
        return torch.nn.functional.rms_norm(x, self.dim, self.weight, self.eps)

    def angles(dim, end, theta):
        tables = []
        for size, positions in zip(dim, end, strict=True):
            frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
            angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
            tables.append(torch.polar(torch.ones_like(angle), angle))
        return tables

    with (
        mock.patch.object(RMSNorm, "forward", rms_norm),
        mock.patch.object(RopeEmbedder, "precompute_freqs_cis", staticmethod(angles)),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def assert_near(ours, theirs, what):
    largest = theirs.abs().max()
    assert (ours - theirs).abs().max() <= TOLERANCE[theirs.dtype] * largest, what


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_all_gradients_equal_diffusers(case, dtype):
    theirs = stock(dtype=dtype)
    ours = fill_ours(theirs)
    x, t, condition, attend, direction = inputs(case, dtype)
    our_out = ours(x, t, condition, grid_positions(case.rows, case.columns), attend)
    our_weights = dict(ours.named_parameters())
    our_grads = torch.autograd.grad((our_out * direction).sum(), [x, condition, *our_weights.values()])
    with in_fp64() if dtype == torch.float64 else contextlib.nullcontext():
        their_out = run_theirs(theirs, case, x, t, condition, attend)
        their_weights = dict(theirs.named_parameters())
        their_grads = torch.autograd.grad(
            (their_out * direction).sum(), [x, condition, *their_weights.values()]
        )
    assert our_out.abs().max() > 0.1
    assert_near(our_out, their_out, "output")
    for what, own, other in zip(("x", "condition"), our_grads, their_grads, strict=False):
        assert_near(own, other, what)
    table, by_name = family_table(CONFIG), dict(zip(their_weights, their_grads[2:], strict=True))
    for name, own in zip(our_weights, our_grads[2:], strict=True):
        assert_near(own, table.to_ours(name, by_name.__getitem__), name)


@pytest.mark.multi
def test_the_stock_classes_weights_make_the_same_model_on_two_tensor_parallel_ranks(torchrun, tmp_path):
    theirs, case = stock(dtype=torch.float64), CASES[4]
    x, t, condition, attend, direction = inputs(case)
    weights = dict(theirs.named_parameters())
    with in_fp64():
        output = run_theirs(theirs, case, x, t, condition, attend)
        gradients = torch.autograd.grad((output * direction).sum(), list(weights.values()))
    given = {
        "config": dataclasses.asdict(CONFIG),
        "weights": theirs.state_dict(),
        "inputs": (x.detach(), t, condition.detach(), grid_positions(case.rows, case.columns), attend),
        "output": output.detach(),
        "direction": direction,
        "gradients": dict(zip(weights, gradients, strict=True)),
    }
    torch.save(given, tmp_path / "stock.pt")
    torchrun(Path(__file__).parent / "ranks_z_image.py", tmp_path / "stock.pt")


def test_parameter_free_norms_are_weights_of_one_in_the_stock_class():
    config = dataclasses.replace(CONFIG, norm_affine=False)
    ours = make(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.2)
    theirs, case = fill_theirs(ours, config), CASES[1]
    table = family_table(config)
    assert set(table.constants.values()) == {1.0}
    for name in table.constants:
        table.check_constant(name, theirs.state_dict()[name])
    with pytest.raises(ValueError, match="layers.0.ffn_norm1.weight is not 1 all over"):
        table.check_constant("layers.0.ffn_norm1.weight", torch.zeros(48))
    x, t, condition, _, _ = inputs(case)
    with in_fp64():
        expected = run_theirs(theirs, case, x, t, condition, None)
    assert_near(ours(x, t, condition, grid_positions(3, 5)), expected, "output")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_sampler_paints_what_their_pipeline_paints(guidance):
    # Their guidance scale is ours less one, and 0 switches it off.
    theirs, steps = stock().eval(), 3
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.3)  # gentle velocities
    ours = fill_ours(theirs)
    torch.manual_seed(3)
    noise, condition, null = torch.randn(2, 24, 64), torch.randn(2, 6, 20), torch.randn(2, 4, 20)
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, transformer=theirs
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        height=64,
        width=96,
        num_inference_steps=steps,
        guidance_scale=guidance - 1,
        latents=unpatchify(noise, 2, 4, 6),
        prompt_embeds=list(condition),
        negative_prompt_embeds=list(null),
        output_type="latent",
        return_dict=False,
    )[0]
    positions = grid_positions(4, 6)
    velocity = Guided(
        lambda x, t: ours(x, t, condition, positions), lambda x, t: ours(x, t, null, positions), guidance
    )
    painted = sample(velocity, noise, steps=steps, shift=3.0).x_BLC
    assert (painted - noise).abs().max() > 0.1
    assert_near(painted, patchify(latents, 2), "latents")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_affine", [True, False])
def test_there_and_back_is_bit_identical(dtype, norm_affine):
    config = dataclasses.replace(CONFIG, norm_affine=norm_affine)
    ours, table = make(config, dtype), family_table(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    weights = dict(ours.named_parameters())
    theirs = {name: table.to_theirs(name, weights.__getitem__) for name in table.theirs}
    back = {name: table.to_ours(name, theirs.__getitem__) for name in table.ours}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_table_has_every_weight_of_both_at_xl_size_and_says_how_ours_are_split():
    config = xl("x", ["x.tar"]).generator
    table = family_table(config)
    with torch.device("meta"):
        ours = dict(make(config, torch.bfloat16).named_parameters())
        theirs = ZImageTransformer2DModel.from_config(their_config(config)).state_dict()
    assert table.ours == {name: tuple(p.shape) for name, p in ours.items()}
    assert table.theirs == {name: tuple(p.shape) for name, p in theirs.items()}
    split = {
        n: p.partition_dim if getattr(p, "tensor_model_parallel", False) else None for n, p in ours.items()
    }
    assert {name: table.partition_dim(name) for name in table.ours} == split


@pytest.mark.parametrize("changes", [{}, {"norm_affine": False}, {"predict": "clean", "token_channels": 128}])
def test_a_config_survives_the_stock_class(changes):
    config = dataclasses.replace(CONFIG, **changes)
    theirs = ZImageTransformer2DModel.from_config(their_config(config))
    assert our_config({**theirs.config, "_class_name": "ZImageTransformer2DModel"}) == config


def test_the_published_config_is_that_of_the_xl_preset():
    assert our_config(PUBLISHED) == xl("x", ["x.tar"]).generator
    ours = their_config(xl("x", ["x.tar"]).generator)
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {
        **{k: v for k, v in PUBLISHED.items() if k[0] != "_"},
        "siglip_feat_dim": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"siglip_feat_dim": 1152}, r"siglip_feat_dim 1152; our generator has it at None.*not the Omni"),
        ({"qk_norm": False}, r"qk_norm False; our generator has it at True"),
        ({"n_kv_heads": 10}, r"n_kv_heads 10; our generator has it at 30"),
        ({"quantization_config": {}}, r"quantization_config, which that class does not\s+take"),
        ({"_iomm": {"colour": 1}}, r"colour under _iomm; this iomm knows predict, norm_affine"),
    ],
)
def test_a_config_that_ours_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        our_config(PUBLISHED | changes)
