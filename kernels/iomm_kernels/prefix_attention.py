"""prefix_attention: a few query rows against the kept keys and values of a frozen prefix, and causally among
themselves.

    o_i = sum over the prefix's rows of the sample and own rows j <= i of softmax_j(scale q_i . k_j) v_j

The frozen MLLM is causal and the queries stand last, so the prefix runs once without gradients and only the Q
query rows are differentiated, in every layer against the prefix's keys and values. The prefix is packed:
tokens that the mask dropped are not there. Gradients of the prefix are computed only where its tensors ask.

Maths, shapes, numerics and bytes: `ragged_attention_kernels`.

`auto` on CUDA prefers triton to flash: flash-attn wants prefix and own keys side by side, a copy of the
prefix in every layer, and always computes the prefix's gradients. This is a count, not a measurement.
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels import ragged_attention
from iomm_kernels import ragged_attention_record as records
from iomm_kernels.ragged_attention import Call
from iomm_kernels.ragged_attention_record import Shape
from iomm_kernels.record import Case, Op


def _call(
    q_BQHK: Tensor,
    own_k_BQGK: Tensor,
    own_v_BQGK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_S: Tensor,
    longest: int | None = None,
    shown_T: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    own = own_k_BQGK, own_v_BQGK
    return ragged_attention.make_call(q_BQHK, (k_TGK, v_TGK), own, cu_S, longest, shown_T, scale)


# --- reference ------------------------------------------------------------------------------------------


def reference(*args: Any) -> Tensor:
    """Plain PyTorch, any floating dtype, differentiable; arguments of `prefix_attention`."""
    return ragged_attention.reference(_call(*args))


# --- public function ------------------------------------------------------------------------------------


def prefix_attention(
    q_BQHK: Tensor,
    own_k_BQGK: Tensor,
    own_v_BQGK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_S: Tensor,
    longest: int | None = None,
    shown_T: Tensor | None = None,
    scale: float | None = None,
    provider: str = "auto",
) -> Tensor:
    """o_BQHK, differentiable in the queries, the own keys and values, and the prefix's if they ask for it.

    Args:
        own_k_BQGK, own_v_BQGK: of the query rows; G divides H (grouped-query attention).
        k_TGK, v_TGK: of the prefix rows of all samples, packed; rows behind cu_S[-1] are padding.
        cu_S: int32, S = B + 1: where each sample's prefix begins and ends.
        longest: a bound of a prefix's length, known without asking the device; None: T.
        shown_T: bool, True where a prefix row may be attended to; None: everywhere.
        scale: None: 1 / sqrt(K).
        provider: "auto", "triton", "flash", "sdpa" or "eager".
    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    call = _call(q_BQHK, own_k_BQGK, own_v_BQGK, k_TGK, v_TGK, cu_S, longest, shown_T, scale)
    return ragged_attention.attend("prefix_attention", call, provider, ("triton", "flash"))


# --- record ---------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple[Any, ...]:
    q, k, v, own_k, own_v, cu, shown, longest, _ = call
    return q, own_k, own_v, k, v, cu, longest, shown


def _case(name: str, lengths: tuple[int, ...], Q: int, heads: tuple[int, int, int], **more: Any) -> Case:
    H, G, K = heads
    shape = Shape(lengths=lengths, Q=Q, H=H, G=G, K=K, own=True, **more)
    return Case(name=name, make=lambda dtype, device: _arguments(records.make(shape, dtype, device)))


def _strided(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Heads before rows in memory, as a transformers cache has them."""
    call = records.make(Shape(lengths=(5, 3), Q=4, H=2, G=2, K=16, own=True), dtype, device)
    return tuple(
        x.transpose(-3, -2).contiguous().transpose(-3, -2) if isinstance(x, Tensor) and x.ndim > 2 else x
        for x in _arguments(call)
    )


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A layer of InternVL3-2B's language model: 8 tokens of auxiliary prompt and the kept of 256 patch
    tokens; the same for all generators and image sizes."""
    del side_px
    kept = round(256 * (0.55 if preset == "xl" else 0.15))
    shape = Shape(lengths=(8 + kept,) * 16, Q=256, H=12, G=2, K=128, own=True)
    return _arguments(records.make(shape, dtype, device))


_STEP = {"lengths": (46,) * 16, "Q": 256, "own": True}

OP = Op(
    name="prefix_attention",
    fused=prefix_attention,
    reference=reference,
    cases=(
        _case("one query, one key", (1,), 1, (1, 1, 16)),
        _case("odd lengths, grouped heads", (7, 0, 19), 17, (2, 1, 16), padding=3),
        _case("nothing kept", (0, 0), 12, (2, 1, 16)),
        _case("everything kept, head of no power of two", (16, 16), 17, (1, 1, 24)),
        _case("key mask", (5, 20), 5, (4, 2, 16), hidden=True, padding=2),
        _case("empty batch", (), 3, (2, 1, 16)),
        Case(name="non-contiguous", make=_strided),
    ),
    differentiable=(0, 1, 2, 3, 4),
    bytes_moved=lambda *args: records.bytes_moved(_call(*args)),
    bytes_issued=lambda *args: records.bytes_issued(_call(*args)),
    compiles=(
        *records.compiles(
            "prefix_attention",
            [Shape(H=12, G=2, K=128, **_STEP), Shape(H=14, G=2, K=64, **_STEP)],  # Qwen2 1.5 B and 0.5 B
            torch.bfloat16,
        ),
        *records.compiles("prefix_attention", [Shape(H=12, G=2, K=128, **_STEP)], torch.float32),
    ),
    bench=_bench,
    flops=lambda *args: records.flops(_call(*args)),
)
