"""Triton kernels of attention over ragged keys, for `masked_cross_attention` and `prefix_attention`.

    keys of sample b = prefix rows [start_b, start_b + length_b) of k_TGK, where shown
                       and, if there are own keys, own[b, 0..i] for query i (causal)
    o_i = sum_j softmax_j(scale q_i . k_j) v_j          a query without any key gives 0

    backward, with p_ij the softmax and dp_ij = do_i . v_j:
    delta_i = sum_j p_ij dp_ij,  ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i

Shapes: q_BQHK, o_BQHK; prefix k_TGK, v_TGK with cu_S int32 (S = B + 1) saying where each sample's rows begin
and end; shown_T bool or None; own_k_BQGK, own_v_BQGK or None. B samples, Q queries, T prefix rows of all
samples, H query heads, G key heads (G divides H: grouped-query attention), K numbers a head. Rows of T behind
cu_S[-1] are padding and are never read.
Numerics: online softmax in base 2, statistics and accumulators fp32; the probabilities are rounded to the
values' dtype before they meet them, as in FlashAttention-2 (arXiv 2307.08691). lse_BHQ (fp32, base 2) is
saved. delta is summed over the keys in a sweep of its own, not taken as o . do: two products more in the
queries' pass, but where softmax has one winner ds cancels exactly, and o need not be kept for the backward
pass. No atomics: queries' gradients and keys' gradients are two passes, so results repeat bit for bit. A key
head's gradient is summed over its group of query heads inside one program.
Bytes: forward reads q, k, v and writes o and lse; scores stay on chip. A program reads its sample's keys, so
they are read once for each tile of queries. fp32 uses no tensor cores (IEEE products).

Not yet run on a GPU.
"""

import math
from typing import Any

import torch
from torch import Tensor

from iomm_kernels.launch import interpreted, jit, next_power_of_2, tl, triton

LOG2_E = math.log2(math.e)


# forward


@jit
def _segment(b, h, cu, Q, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, OWN: tl.constexpr):
    """First row, number of rows, and first number's offset of a sample's own or prefix keys for a head."""
    if OWN:
        first, length = b.to(tl.int64) * Q, Q
    else:
        first = tl.load(cu + b).to(tl.int64)
        length = tl.load(cu + b + 1) - tl.load(cu + b)
    return first, length, (first * G + h // (H // G)) * K


@jit
def _rows(pointer, row, rows, stride, K: tl.constexpr, BK: tl.constexpr):
    """(row, BK) numbers; zero outside."""
    col = tl.arange(0, BK)
    inside = (row < rows)[:, None] & (col < K)[None, :]
    return tl.load(pointer + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@jit
def _store_rows(pointer, value, row, rows, stride, K: tl.constexpr, BK: tl.constexpr):
    col = tl.arange(0, BK)
    inside = (row < rows)[:, None] & (col < K)[None, :]
    tl.store(pointer + row[:, None] * stride + col[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@jit
def _visible(query, key, length, first, shown, SHOWN: tl.constexpr, OWN: tl.constexpr):
    """Which scores count; `query` and `key` broadcast to the scores' shape."""
    visible = key < length
    if SHOWN:
        visible = visible & (tl.load(shown + first + key, mask=key < length, other=0) != 0)
    if OWN:
        visible = visible & (key <= query)
    return visible


@jit
def _accumulate(
    q, query, top, total, o, k, v, cu, shown, b, h, Q, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SHOWN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Online softmax over one segment of keys."""
    first, length, offset = _segment(b, h, cu, Q, H, G, K, OWN)
    stop = length
    if OWN:
        stop = tl.minimum(length, (tl.program_id(0) + 1) * BQ)
    for start in range(0, stop, BN):
        key = start + tl.arange(0, BN)
        k_NK = _rows(k + offset, key, length, G * K, K, BK)
        score = tl.dot(q, tl.trans(k_NK), input_precision="ieee") * scale
        visible = _visible(query[:, None], key[None, :], length, first, shown, SHOWN, OWN)
        score = tl.where(visible, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v_NK = _rows(v + offset, key, length, G * K, K, BK)
        o = tl.dot(p.to(v_NK.dtype), v_NK, o * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, o


@jit
def forward_kernel(
    q, k, v, own_k, own_v, cu, shown, o, lse, Q, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SHOWN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """A program attends from BQ queries of one head of one sample. `scale` includes log2(e)."""
    h, b = tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0) * BQ + tl.arange(0, BQ)
    at = (b.to(tl.int64) * Q * H + h) * K
    q_QK = _rows(q + at, query, Q, H * K, K, BK)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, BK), tl.float32)
    top, total, acc = _accumulate(
        q_QK, query, top, total, acc, k, v, cu, shown, b, h, Q, scale, H, G, K, BK, BQ, BN, SHOWN, False
    )
    if OWN:
        top, total, acc = _accumulate(
            q_QK, query, top, total, acc, own_k, own_v, cu, shown, b, h, Q, scale,
            H, G, K, BK, BQ, BN, False, True,
        )  # fmt: skip
    some = total > 0
    _store_rows(o + at, acc / tl.where(some, total, 1.0)[:, None], query, Q, H * K, K, BK)
    value = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), 0.0)
    tl.store(lse + (b.to(tl.int64) * H + h) * Q + query, value, mask=query < Q)


# backward


@jit
def _sweep(
    acc, q, do, query, lse, delta, k, v, cu, shown, b, h, Q, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SHOWN: tl.constexpr, OWN: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Adds one segment of keys to delta_i = sum_j p_ij dp_ij, or to sum_j ds_ij k_j."""
    first, length, offset = _segment(b, h, cu, Q, H, G, K, OWN)
    stop = length
    if OWN:
        stop = tl.minimum(length, (tl.program_id(0) + 1) * BQ)
    for start in range(0, stop, BN):
        key = start + tl.arange(0, BN)
        k_NK = _rows(k + offset, key, length, G * K, K, BK)
        v_NK = _rows(v + offset, key, length, G * K, K, BK)
        score = tl.dot(q, tl.trans(k_NK), input_precision="ieee") * scale
        visible = _visible(query[:, None], key[None, :], length, first, shown, SHOWN, OWN)
        p = tl.where(visible, tl.exp2(score - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v_NK), input_precision="ieee")
        if DELTA:
            acc += tl.sum(p * dp, axis=1)
        else:
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k_NK.dtype), k_NK, acc, input_precision="ieee")
    return acc


@jit
def dq_kernel(
    q, k, v, own_k, own_v, cu, shown, do, lse, delta, dq, Q, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SHOWN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Gradients of BQ queries of one head of one sample, and their delta for the keys' pass."""
    h, b = tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0) * BQ + tl.arange(0, BQ)
    at = (b.to(tl.int64) * Q * H + h) * K
    statistics = (b.to(tl.int64) * H + h) * Q + query
    q_QK = _rows(q + at, query, Q, H * K, K, BK)
    do_QK = _rows(do + at, query, Q, H * K, K, BK)
    lse_Q = tl.load(lse + statistics, mask=query < Q, other=0.0)
    delta_Q = tl.zeros((BQ,), tl.float32)
    delta_Q = _sweep(
        delta_Q, q_QK, do_QK, query, lse_Q, lse_Q, k, v, cu, shown, b, h, Q, scale,
        H, G, K, BK, BQ, BN, SHOWN, False, True,
    )  # fmt: skip
    if OWN:
        delta_Q = _sweep(
            delta_Q, q_QK, do_QK, query, lse_Q, lse_Q, own_k, own_v, cu, shown, b, h, Q, scale,
            H, G, K, BK, BQ, BN, False, True, True,
        )  # fmt: skip
    tl.store(delta + statistics, delta_Q, mask=query < Q)
    dq_QK = tl.zeros((BQ, BK), tl.float32)
    dq_QK = _sweep(
        dq_QK, q_QK, do_QK, query, lse_Q, delta_Q, k, v, cu, shown, b, h, Q, scale,
        H, G, K, BK, BQ, BN, SHOWN, False, False,
    )  # fmt: skip
    if OWN:
        dq_QK = _sweep(
            dq_QK, q_QK, do_QK, query, lse_Q, delta_Q, own_k, own_v, cu, shown, b, h, Q, scale,
            H, G, K, BK, BQ, BN, False, True, False,
        )  # fmt: skip
    _store_rows(dq + at, dq_QK * (scale / 1.4426950408889634), query, Q, H * K, K, BK)


@jit
def dkv_kernel(
    q, k, v, cu, shown, do, lse, delta, dk, dv, Q, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SHOWN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of one key head of one sample, summed over the queries of the group's
    heads, one after the other."""
    g, b = tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H // G
    first, length, offset = _segment(b, g * GROUP, cu, Q, H, G, K, OWN)
    start = tl.program_id(0) * BN
    if start < length:
        key = start + tl.arange(0, BN)
        k_NK = _rows(k + offset, key, length, G * K, K, BK)
        v_NK = _rows(v + offset, key, length, G * K, K, BK)
        dk_NK = tl.zeros((BN, BK), tl.float32)
        dv_NK = tl.zeros((BN, BK), tl.float32)
        from_block = 0
        if OWN:
            from_block = start // BQ  # earlier queries see none of these keys
        blocks = tl.cdiv(Q, BQ) - from_block
        for step in range(0, GROUP * blocks):
            h = g * GROUP + step // blocks
            query = (from_block + step % blocks) * BQ + tl.arange(0, BQ)
            at = (b.to(tl.int64) * Q * H + h) * K
            statistics = (b.to(tl.int64) * H + h) * Q + query
            q_QK = _rows(q + at, query, Q, H * K, K, BK)
            do_QK = _rows(do + at, query, Q, H * K, K, BK)
            lse_Q = tl.load(lse + statistics, mask=query < Q, other=0.0)
            delta_Q = tl.load(delta + statistics, mask=query < Q, other=0.0)
            score = tl.dot(k_NK, tl.trans(q_QK), input_precision="ieee") * scale
            visible = _visible(query[None, :], key[:, None], length, first, shown, SHOWN, OWN)
            p = tl.where(visible, tl.exp2(score - lse_Q[None, :]), 0.0)
            dv_NK = tl.dot(p.to(do_QK.dtype), do_QK, dv_NK, input_precision="ieee")
            dp = tl.dot(v_NK, tl.trans(do_QK), input_precision="ieee")
            ds = p * (dp - delta_Q[None, :])
            dk_NK = tl.dot(ds.to(q_QK.dtype), q_QK, dk_NK, input_precision="ieee")
        _store_rows(dk + offset, dk_NK * (scale / 1.4426950408889634), key, length, G * K, K, BK)
        _store_rows(dv + offset, dv_NK, key, length, G * K, K, BK)


# launches


def shipped_tiles(kind: str, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of a pass, "forward", "dq" or "dkv", on a GPU: the largest that do not
    spill on sm_90a."""
    BK = max(16, next_power_of_2(K))
    if dtype == torch.float32:
        side = 16 if kind == "dq" else 32
        return {"BK": BK, "BQ": side, "BN": side, "num_warps": 8, "num_stages": 1}
    BQ, warps = {"forward": (128, 8), "dq": (64, 4), "dkv": (64, 8)}[kind]
    return {"BK": BK, "BQ": BQ, "BN": 64, "num_warps": warps, "num_stages": 2}


def tiles(kind: str, K: int, dtype: torch.dtype) -> dict[str, int]:
    """`shipped_tiles`, small ones in the interpreter."""
    tile = shipped_tiles(kind, K, dtype)
    return {"BK": tile["BK"], "BQ": 16, "BN": 16} if interpreted() else tile


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, Tensor] | None, cu: Tensor, shown: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o_BQHK and lse_BHQ. All tensors contiguous."""
    (B, Q, H, K), G = q.shape, k.shape[1]
    o, lse = torch.empty_like(q), q.new_empty((B, H, Q), dtype=torch.float32)
    if q.numel():
        tile = tiles("forward", K, q.dtype)
        forward_kernel[(triton.cdiv(Q, tile["BQ"]), H, B)](
            q, k, v, *(own or (k, v)), cu, _bytes(shown, cu), o, lse, Q, scale * LOG2_E, H=H, G=G, K=K,
            SHOWN=shown is not None, OWN=own is not None, **tile,
        )  # fmt: skip
    return o, lse


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, Tensor] | None, cu: Tensor, shown: Tensor | None,
    scale: float, lse: Tensor, do: Tensor, longest: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq; d of the own keys and values, if there are any; dk and dv of the prefix where `longest`, the bound
    of a prefix's length, is given."""
    (B, Q, H, K), G = q.shape, k.shape[1]
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    out, scale2 = [dq], scale * LOG2_E
    prefix = [] if longest is None else [torch.zeros_like(k), torch.zeros_like(v)]
    if not q.numel():
        return dq, *(torch.zeros_like(x) for x in own or ()), *prefix
    shown_ = _bytes(shown, cu)
    sizes: dict[str, Any] = {"H": H, "G": G, "K": K}
    tile = tiles("dq", K, q.dtype)
    dq_kernel[(triton.cdiv(Q, tile["BQ"]), H, B)](
        q, k, v, *(own or (k, v)), cu, shown_, do, lse, delta, dq, Q, scale2, **sizes,
        SHOWN=shown is not None, OWN=own is not None, **tile,
    )  # fmt: skip
    tile = tiles("dkv", K, q.dtype)
    if own is not None:
        grads = [torch.empty_like(x) for x in own]
        dkv_kernel[(triton.cdiv(Q, tile["BN"]), G, B)](
            q, *own, cu, shown_, do, lse, delta, *grads, Q, scale2, **sizes, SHOWN=False, OWN=True, **tile
        )
        out += grads
    if longest:
        dkv_kernel[(triton.cdiv(longest, tile["BN"]), G, B)](
            q, k, v, cu, shown_, do, lse, delta, *prefix, Q, scale2, **sizes, SHOWN=shown is not None,
            OWN=False, **tile,
        )  # fmt: skip
    return *out, *prefix


def _bytes(shown: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if shown is None else shown.view(torch.int8)
