"""Passes of memory-bound operators against the bytes that the real functions read and write."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from iomm.conditioning.connector import TransformerLayer
from iomm.model.blocks_z_image import scaled
from iomm.model.rope import rope
from iomm.plan import elementwise
from iomm.plan.costs import codec_item
from iomm.plan.elementwise import Passes
from iomm.plan.shapes import CodecShape, LmShape
from iomm_kernels import gated_residual, gated_residual_modulate, modulate, qk_norm_rope
from tests.plan.encoders import codec_of, lm_of

ROWS, SAMPLES, WIDTH = 64, 3, 128
# Products and attention are counted as FLOPs; the rest of this list is the test's own doing.
NOT_COUNTED = ("mm", "addmm", "bmm", "convolution", "ones_like", "copy_", "new_empty_strided")


class Moved(TorchDispatchMode):
    """Bytes of inputs and outputs of every operator that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if not (operator.is_view or name in NOT_COUNTED or "attention" in name or name == "_unsafe_view"):
            tensors = [x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def passes_of(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> tuple[float, float]:
    """(forward, backward) in passes over rows x width of bf16."""
    unit = ROWS * SAMPLES * WIDTH * 2
    with Moved() as forward:
        out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    with Moved() as backward:
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    return forward.bytes / unit, backward.bytes / unit


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, SAMPLES, WIDTH)), dtype=torch.bfloat16).requires_grad_()


def vector() -> Tensor:
    return rows(SAMPLES, WIDTH)


def half() -> Tensor:
    return rows(ROWS // 2, SAMPLES, WIDTH)


ROPE = rope(torch.zeros(ROWS, 3, dtype=torch.long), (16, 24, 24), 1e4, torch.bfloat16)
FAMILIES: dict[str, tuple[Passes, Callable[..., Tensor | tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "modulate": (elementwise.MODULATE, modulate.reference, (rows(), vector(), vector())),
    "gated residual": (elementwise.GATED, gated_residual.reference, (rows(), vector(), rows())),
    "gated residual, modulate": (
        elementwise.GATED_MODULATE,
        gated_residual_modulate.reference,
        (rows(), vector(), rows(), vector(), vector()),
    ),
    "gelu": (elementwise.GELU, lambda x: functional.gelu(x, approximate="tanh"), (rows(),)),
    "cat": (elementwise.CAT, lambda x, y: torch.cat((x, y)), (half(), half())),
    "silu": (elementwise.SILU_TIMES, lambda x, y: functional.silu(x) * y, (rows(), rows())),
    "z scale": (elementwise.SCALE, scaled, (rows(), vector())),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_passes_are_those_of_the_real_function(name):
    passes, function, inputs = FAMILIES[name]
    forward, backward = passes_of(function, *inputs)
    assert forward == pytest.approx(passes.eager_forward, rel=0.06)
    assert backward == pytest.approx(passes.eager_backward, rel=0.08, abs=0.1)


def test_eager_passes_of_the_rotation(monkeypatch):
    # The norm counts as torch's fused one, which a CPU has not: the rotation alone.
    monkeypatch.setattr(functional, "rms_norm", lambda x, *_: x)
    weight = torch.ones(64, dtype=torch.bfloat16)
    both = rows(ROWS, SAMPLES, 2, 64), rows(ROWS, SAMPLES, 2, 64)
    forward, backward = passes_of(lambda q, k: qk_norm_rope.reference(q, k, weight, weight, *ROPE), *both)
    assert forward == pytest.approx(2 * elementwise.ROTATE.eager_forward, rel=0.03)
    assert backward == pytest.approx(2 * elementwise.ROTATE.eager_backward, rel=0.03)


@pytest.mark.parametrize("passes", [p for p, _, _ in FAMILIES.values()])
def test_fused_operators_never_move_more(passes):
    assert passes.fused_forward <= passes.eager_forward and passes.fused_backward <= passes.eager_backward


@pytest.mark.parametrize(("mlp", "kv_heads"), [(4, 1), (2, 2)])
def test_lm_layer_as_the_transformers_library_computes_it(mlp, kv_heads):
    def measure(layers: int) -> tuple[float, float]:
        shape = LmShape(
            width=WIDTH,
            layers=layers,
            heads=2,
            kv_heads=kv_heads,
            mlp=mlp * WIDTH,
            vocabulary=10,
            tied=True,
        )
        lm = lm_of(shape).to(torch.bfloat16)
        attend = torch.ones(SAMPLES, ROWS, dtype=torch.long)
        attend[0, 0] = 0  # so that the mask is an explicit one, as with a prefix
        return passes_of(
            lambda x: lm(inputs_embeds=x, attention_mask=attend, use_cache=False).last_hidden_state,
            rows(SAMPLES, ROWS, WIDTH),
        )

    one, two = measure(1), measure(2)
    passes = elementwise.lm_layer(mlp, kv_heads / 2)
    assert two[0] - one[0] == pytest.approx(passes.eager_forward, rel=0.03)
    assert two[1] - one[1] == pytest.approx(passes.eager_backward, rel=0.03)


def test_connector_layer():
    layer = TransformerLayer(WIDTH, 2, torch.bfloat16)
    forward, backward = passes_of(lambda x: layer(x, None), rows(SAMPLES, ROWS, WIDTH))
    passes = elementwise.CONNECTOR_LAYER
    assert forward == pytest.approx(passes.eager_forward, rel=0.05)
    assert backward == pytest.approx(passes.eager_backward, rel=0.2)


def test_autoencoder_resnets():
    shape = CodecShape(name="small", channels=(32, 32), resnets=2, latent_channels=4)
    vae = codec_of(shape, norm_groups=8)
    with Moved() as moved:
        vae.encoder(torch.randn(1, 3, 64, 64))
    assert codec_item(shape, 64).moved == pytest.approx(moved.bytes, rel=0.15)
