"""masked_cross_attention: learned queries read ragged keys (RQA, the residual query adapter).

    o_i = sum over the sample's keys that count of softmax_j(scale q_i . k_j) v_j       0 where no key counts

Keys of all samples are packed into one sequence: masked and padding tokens are either not there (cu_seqlens)
or hidden by a key mask. Padded keys (B, P, G, K) are the packed ones with cu_seqlens 0, P, 2 P, ... :
`padded_cu_seqlens`. No causal order among the queries.

Maths, shapes, numerics and bytes: `ragged_attention_kernels`.

`auto` on CUDA prefers flash-attn, where it is installed and there is no key mask, to triton: the packed keys
are what its varlen kernels take as they are. This is a rule, not a measurement.
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
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_S: Tensor,
    longest: int | None = None,
    shown_T: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    return ragged_attention.make_call(q_BQHK, (k_TGK, v_TGK), (None, None), cu_S, longest, shown_T, scale)


# --- reference ------------------------------------------------------------------------------------------


def reference(*args: Any) -> Tensor:
    """Plain PyTorch, any floating dtype, differentiable; arguments of `masked_cross_attention`."""
    return ragged_attention.reference(_call(*args))


# --- public functions -----------------------------------------------------------------------------------


def masked_cross_attention(
    q_BQHK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_S: Tensor,
    longest: int | None = None,
    shown_T: Tensor | None = None,
    scale: float | None = None,
    provider: str = "auto",
) -> Tensor:
    """o_BQHK, differentiable in queries, keys and values.

    Args:
        k_TGK, v_TGK: of all samples, packed; rows behind cu_S[-1] are padding. G divides H.
        cu_S: int32, S = B + 1: where each sample's keys begin and end.
        longest: a bound of a sample's number of keys, known without asking the device; None: T.
        shown_T: bool, True where a key counts; None: everywhere.
        scale: None: 1 / sqrt(K).
        provider: "auto", "triton", "flash", "sdpa" or "eager".
    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    call = _call(q_BQHK, k_TGK, v_TGK, cu_S, longest, shown_T, scale)
    return ragged_attention.attend("masked_cross_attention", call, provider, ("flash", "triton"))


def padded_cu_seqlens(samples: int, positions: int, device: torch.device) -> Tensor:
    """cu_S of keys (B, P, ...) flattened to (B P, ...)."""
    return torch.arange(samples + 1, device=device, dtype=torch.int32) * positions


# --- record ---------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple[Any, ...]:
    return call.q_BQHK, call.k_TGK, call.v_TGK, call.cu_S, call.longest, call.shown_T


def _case(name: str, lengths: tuple[int, ...], Q: int, heads: tuple[int, int, int], **more: Any) -> Case:
    H, G, K = heads
    shape = Shape(lengths=lengths, Q=Q, H=H, G=G, K=K, own=False, **more)
    return Case(name=name, make=lambda dtype, device: _arguments(records.make(shape, dtype, device)))


def _shared_queries(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The adapter's: one set of queries for all samples, and keys strided by a joint projection."""
    shape = Shape(lengths=(4, 6), Q=5, H=2, G=2, K=16, own=False)
    q, k, v, *rest = _arguments(records.make(shape, dtype, device))
    k, v = torch.cat((k, v), dim=-1).chunk(2, dim=-1)
    return q[:1].expand(2, -1, -1, -1), k, v, *rest


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """RQA at the MLLM's width 1536 over 8 tokens of auxiliary prompt and the kept of 256 patch tokens; the
    same for all generators and image sizes."""
    del side_px
    kept = round(256 * (0.55 if preset == "xl" else 0.15))
    shape = Shape(lengths=(8 + kept,) * 16, Q=256, H=12, G=12, K=128, own=False)
    return _arguments(records.make(shape, dtype, device))


_STEP = {"lengths": (46,) * 16, "Q": 256, "own": False}

OP = Op(
    name="masked_cross_attention",
    fused=masked_cross_attention,
    reference=reference,
    cases=(
        _case("one query, one key", (1,), 1, (1, 1, 16)),
        _case("odd lengths", (7, 0, 19), 17, (2, 2, 16), padding=3),
        _case("nothing kept", (0, 0), 3, (2, 2, 16)),
        _case("everything kept, head of no power of two", (16, 16), 17, (1, 1, 24)),
        _case("key mask, grouped heads", (5, 20), 5, (4, 2, 16), hidden=True, padding=2),
        _case("a sample with all keys hidden", (1, 4), 3, (2, 2, 16), hidden=True),
        _case("empty batch", (), 3, (2, 2, 16)),
        Case(name="non-contiguous", make=_shared_queries),
    ),
    differentiable=(0, 1, 2),
    bytes_moved=lambda *args: records.bytes_moved(_call(*args)),
    bytes_issued=lambda *args: records.bytes_issued(_call(*args)),
    compiles=(
        *records.compiles(
            "masked_cross_attention",
            [
                Shape(H=12, G=12, K=128, **_STEP),  # B, L, XL: width 1536
                Shape(H=16, G=16, K=96, **_STEP),
                Shape(H=14, G=14, K=64, **_STEP),  # width 896
                Shape(H=12, G=12, K=128, hidden=True, **_STEP),
            ],
            torch.bfloat16,
        ),
        *records.compiles("masked_cross_attention", [Shape(H=12, G=12, K=128, **_STEP)], torch.float32),
    ),
    bench=_bench,
    flops=lambda *args: records.flops(_call(*args)),
)
