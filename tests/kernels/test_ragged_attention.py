"""Providers and choice of the two attentions; the kernels themselves are in test_ops.py."""

import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iomm_kernels import ragged_attention
from iomm_kernels.masked_cross_attention import masked_cross_attention, padded_cu_seqlens
from iomm_kernels.prefix_attention import prefix_attention
from iomm_kernels.ragged_attention import Call
from iomm_kernels.ragged_attention_record import Shape, make

CPU = torch.device("cpu")
GROUPED = Shape(lengths=(5, 0, 9), Q=4, H=4, G=2, K=8, own=True, padding=2)
CROSS = Shape(lengths=(5, 0, 9), Q=4, H=2, G=2, K=8, own=False, padding=2, hidden=True)
SHAPES = pytest.mark.parametrize("shape", [GROUPED, CROSS], ids=["prefix", "cross"])


def call_of(shape: Shape, dtype: torch.dtype = torch.float64) -> Call:
    """A call whose floating tensors ask for gradients."""
    call = make(shape, dtype, CPU)
    return call._replace(**{n: x.requires_grad_() for n, x in leaves(call).items()})


def leaves(call: Call) -> dict[str, Tensor]:
    return {n: x for n, x in zip(Call._fields[:5], call[:5], strict=True) if x is not None}


def by_definition(call: Call) -> Tensor:
    """Softmax written out for every query of every head, one at a time."""
    o_BQHK = torch.zeros_like(call.q_BQHK)
    B, Q, H, _ = call.q_BQHK.shape
    group = H // call.k_TGK.shape[1]
    for b in range(B):
        rows = [t for t in range(int(call.cu_S[b]), int(call.cu_S[b + 1]))]
        rows = [t for t in rows if call.shown_T is None or call.shown_T[t]]
        for i in range(Q):
            for h in range(H):
                k, v = call.k_TGK[rows, h // group], call.v_TGK[rows, h // group]
                if call.own_k_BQGK is not None and call.own_v_BQGK is not None:
                    k = torch.cat((k, call.own_k_BQGK[b, : i + 1, h // group]))
                    v = torch.cat((v, call.own_v_BQGK[b, : i + 1, h // group]))
                if len(k):
                    p = torch.softmax(call.scale * (k @ call.q_BQHK[b, i, h]), dim=0)
                    o_BQHK[b, i, h] = p @ v
    return o_BQHK


def outcome(function: Callable[[Call], Tensor], call: Call) -> tuple[Tensor, ...]:
    """The output, and the gradients for a seeded gradient of it."""
    o_BQHK = function(call)
    weight = torch.randn(o_BQHK.shape, generator=torch.Generator().manual_seed(0), dtype=o_BQHK.dtype)
    return o_BQHK, *torch.autograd.grad(o_BQHK, list(leaves(call).values()), weight)


@SHAPES
@pytest.mark.parametrize("provider", [ragged_attention.reference, ragged_attention.sdpa])
def test_every_pytorch_form_is_softmax_over_the_visible_keys(
    shape: Shape, provider: Callable[[Call], Tensor]
) -> None:
    truth = by_definition(make(shape, torch.float64, CPU))
    torch.testing.assert_close(provider(make(shape, torch.float64, CPU)), truth, rtol=1e-12, atol=1e-12)


@SHAPES
def test_gradients_of_pytorchs_attention_are_the_references(shape: Shape) -> None:
    call = call_of(shape)
    pairs = zip(outcome(ragged_attention.sdpa, call), outcome(ragged_attention.reference, call), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_hidden_keys_and_dropped_keys_agree() -> None:
    hidden = make(Shape(lengths=(6, 9), Q=3, H=2, G=1, K=8, own=True, hidden=True), torch.float64, CPU)
    shown_T, own_k, own_v = hidden.shown_T, hidden.own_k_BQGK, hidden.own_v_BQGK
    assert shown_T is not None and own_k is not None and own_v is not None
    cu_S = torch.tensor([0, int(shown_T[:6].sum()), int(shown_T.sum())], dtype=torch.int32)
    own = hidden.q_BQHK, own_k, own_v
    packed = hidden.k_TGK[shown_T], hidden.v_TGK[shown_T]
    for provider in ("auto", "eager", "sdpa"):
        hide = prefix_attention(
            *own, hidden.k_TGK, hidden.v_TGK, hidden.cu_S, shown_T=shown_T, provider=provider
        )
        drop = prefix_attention(*own, *packed, cu_S, provider=provider)
        torch.testing.assert_close(hide, drop, rtol=1e-12, atol=1e-12)


def test_padded_keys_are_packed_ones_of_equal_length() -> None:
    q_BQHK, k_BPHK, v_BPHK = (torch.randn(2, n, 3, 8) for n in (4, 5, 5))
    keep_BP = torch.rand(2, 5) < 0.7
    got = masked_cross_attention(
        q_BQHK, k_BPHK.flatten(0, 1), v_BPHK.flatten(0, 1), padded_cu_seqlens(2, 5, CPU), 5, keep_BP.flatten()
    )
    turned = (x.transpose(1, 2) for x in (q_BQHK, k_BPHK, v_BPHK))
    expected = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=keep_BP[:, None, None])
    torch.testing.assert_close(got, expected.transpose(1, 2))


class StaleGradients(torch.autograd.Function):
    """Rows that no sequence has get no gradient from flash-attn: its memory is not cleared."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows = int(rows)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        stale = grads[0].clone()
        stale[ctx.rows :] = torch.nan
        return stale, None


def stand_in_for_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: bool, deterministic: bool,
) -> Tensor:  # fmt: skip
    """What flash-attn documents of its function: each sequence alone, causal aligned to the last key."""
    assert deterministic
    k, v = (StaleGradients.apply(x, cu_seqlens_k[-1]) for x in (k, v))
    out = []
    for b in range(len(cu_seqlens_q) - 1):
        mine, keys = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        turned = (x.transpose(0, 1) for x in (q[mine], k[keys], v[keys]))
        rows, columns = mine.stop - mine.start, keys.stop - keys.start
        assert rows <= max_seqlen_q and columns <= max_seqlen_k
        visible = torch.ones(rows, columns, dtype=torch.bool)
        visible = visible.tril(columns - rows) if causal else visible
        o = torch.nn.functional.scaled_dot_product_attention(
            *turned, attn_mask=visible, scale=softmax_scale, enable_gqa=True
        )
        out.append(o.transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize(
    "shape",
    [GROUPED, Shape(lengths=(5, 2), Q=4, H=2, G=2, K=8, own=False, padding=3)],
    ids=["prefix", "cross"],
)
def test_flash_attn_is_given_prefix_and_own_keys_side_by_side(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in_for_flash_attn
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    call = call_of(shape)
    pairs = zip(outcome(ragged_attention.flash, call), outcome(ragged_attention.reference, call), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("provider", [ragged_attention.reference, ragged_attention.sdpa])
def test_padding_reads_nothing_back_from_the_device(provider: Callable[[Call], Tensor]) -> None:
    """Tensors without values: whatever asked for one would fail."""
    call = make(GROUPED, torch.float32, CPU)
    moved = {n: x.to("meta") for n, x in call._asdict().items() if isinstance(x, Tensor)}
    there = call._replace(**moved)
    assert provider(there).shape == call.q_BQHK.shape


def choose(order: tuple[str, ...], **problems: str | None) -> str:
    return ragged_attention._choose("an operator", "auto", order, problems, "cuda")


def test_auto_takes_the_first_that_can_serve_and_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    ragged_attention._logged.clear()
    with caplog.at_level(logging.INFO, "iomm_kernels"):
        assert choose(("flash", "triton"), flash=None, triton=None) == "flash"
        assert choose(("flash", "triton"), flash="is not installed", triton=None) == "triton"
        assert choose(("flash", "triton"), flash="is not installed", triton=None) == "triton"
        assert choose(("triton", "flash"), flash="is not installed", triton="is not installed") == "sdpa"
    assert [record.getMessage() for record in caplog.records] == [
        "an operator on cuda: flash (preferred to triton)",
        "an operator on cuda: triton (flash is not installed)",
        "an operator on cuda: sdpa (triton is not installed; flash is not installed)",
    ]


def test_a_provider_that_cannot_serve_is_an_error_that_says_why() -> None:
    call = make(CROSS, torch.float32, CPU)
    for provider, why in {
        "flash": "it is not installed",
        "triton": "it compiles for CUDA tensors only",
        "csrc": "is none of auto, triton, flash, sdpa, eager",
    }.items():
        with pytest.raises(ValueError, match=f"masked_cross_attention: provider '{provider}'.*{why}"):
            masked_cross_attention(call.q_BQHK, call.k_TGK, call.v_TGK, call.cu_S, provider=provider)


def test_heads_too_large_for_the_kernels_and_fp64_are_said() -> None:
    call = make(Shape(lengths=(1,), Q=1, H=1, G=1, K=256, own=False), torch.float32, CPU)
    assert ragged_attention._problem("triton", call) == "holds heads of at most 128 numbers, not 256"
    call = make(Shape(lengths=(1,), Q=1, H=1, G=1, K=64, own=False), torch.float64, CPU)
    assert ragged_attention._problem("triton", call) == "computes in fp32 and does not take float64"


def test_arguments_that_do_not_fit_are_refused() -> None:
    call = make(GROUPED, torch.float32, CPU)
    assert call.own_k_BQGK is not None
    for wrong, rule in (
        (call._replace(k_TGK=call.k_TGK[..., :4]), "keys and values of one shape"),
        (call._replace(cu_S=call.cu_S.long()), r"cu_seqlens int32 of shape \(4,\)"),
        (call._replace(shown_T=torch.ones(3, dtype=torch.bool)), r"a key mask bool of shape \(16,\)"),
        (call._replace(own_k_BQGK=call.own_k_BQGK[:, 1:]), r"own keys and values of shape \(3, 4, 2, 8\)"),
        (call._replace(q_BQHK=call.q_BQHK.double()), "one dtype"),
    ):
        with pytest.raises(ValueError, match=f"prefix_attention needs {rule}.*Given: q_BQHK"):
            ragged_attention.check("prefix_attention", wrong)
