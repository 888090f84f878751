"""Cases, byte counts and compiled configurations of the operators over `ragged_attention_kernels`.

B samples, Q queries, H query heads, G key heads, K numbers a head, T prefix rows of all samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iomm_kernels.ragged_attention import Call
from iomm_kernels.ragged_attention_kernels import dkv_kernel, dq_kernel, forward_kernel, shipped_tiles, tiles
from iomm_kernels.record import Compile, draw

KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
PASSES = (("forward", "all"), ("dq", "all"), ("dkv", "prefix"), ("dkv", "own"))
TYPES = {"cu": "*i32", "shown": "*i8", "lse": "*fp32", "delta": "*fp32", "Q": "i32", "scale": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one call."""

    lengths: tuple[int, ...]  # prefix rows of each sample
    Q: int
    H: int
    G: int
    K: int
    own: bool
    padding: int = 0  # rows of T behind the last sample
    hidden: bool = False  # a key mask that hides every third row

    @property
    def B(self) -> int:
        return len(self.lengths)


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    """A seeded call. Padding rows hold NaN: whoever reads them shows it."""
    s, T = shape, sum(shape.lengths) + shape.padding
    q_BQHK = draw(1, s.B, s.Q, s.H, s.K, dtype=dtype, device=device)
    k_TGK, v_TGK = (draw(seed, T, s.G, s.K, dtype=dtype, device=device) for seed in (2, 3))
    own_k, own_v = (
        draw(seed, s.B, s.Q, s.G, s.K, dtype=dtype, device=device) if s.own else None for seed in (4, 5)
    )
    bounds = torch.tensor((0, *s.lengths), device=device).cumsum(0)
    for x in (k_TGK, v_TGK):
        x[sum(s.lengths) :] = torch.nan
    shown_T = torch.arange(T, device=device) % 3 != 0 if s.hidden else None
    longest = max(s.lengths, default=0)
    return Call(q_BQHK, k_TGK, v_TGK, own_k, own_v, bounds.int(), shown_T, longest, s.K**-0.5)


def shape_of(call: Call) -> Shape:
    """The shape of a call; reads cu_S from the device."""
    lengths = tuple((call.cu_S[1:] - call.cu_S[:-1]).tolist())
    (_, Q, H, K), (T, G, _) = call.q_BQHK.shape, call.k_TGK.shape
    own, hidden = call.own_k_BQGK is not None, call.shown_T is not None
    return Shape(lengths=lengths, Q=Q, H=H, G=G, K=K, own=own, padding=T - sum(lengths), hidden=hidden)


def bytes_moved(call: Call) -> int:
    """Of the forward pass, inputs once and outputs once."""
    return _forward_bytes(call)[0]


def bytes_issued(call: Call) -> int:
    """Of the forward kernel: keys are read once for each tile of queries and each query head."""
    return _forward_bytes(call)[1]


def flops(call: Call) -> int:
    """Of the forward pass: two products over the scores that count; a key mask is not counted off."""
    s = shape_of(call)
    scores = s.Q * sum(s.lengths) + s.own * s.B * s.Q * (s.Q + 1) // 2
    return 4 * s.H * s.K * scores


def _forward_bytes(call: Call) -> tuple[int, int]:
    s, dtype = shape_of(call), call.q_BQHK.dtype
    return _bytes("forward", s, dtype, tiles("forward", s.K, dtype))


def _bytes(
    kind: str, s: Shape, dtype: torch.dtype, tile: dict[str, int], of_prefix: bool = True
) -> tuple[int, int]:
    """(inputs and outputs once, what the launch accesses). "dkv" is of the prefix or of the own keys."""
    row, rows, BQ, BN = s.K * dtype.itemsize, sum(s.lengths), tile["BQ"], tile["BN"]
    queries = s.B * s.Q * s.H
    if kind == "dkv":
        lengths = s.lengths if of_prefix else (s.Q,) * s.B
        keys = 4 * sum(lengths) * s.G * row  # k, v and their gradients
        tile_starts = [start for length in lengths for start in range(0, length, BN)]
        seen = sum(s.Q - (0 if of_prefix else start // BQ * BQ) for start in tile_starts)
        extra = sum(lengths) * s.G * s.hidden + 8 * s.G * (len(tile_starts) + 2 * s.B)
        return keys + queries * (2 * row + 8), keys + seen * s.H * (2 * row + 8) + extra
    touched = {"forward": 2 * row + 4, "dq": 3 * row + 8}[kind] * queries
    starts = range(0, s.Q, BQ)
    own = sum(min(s.Q, -(-min(start + BQ, s.Q) // BN) * BN) for start in starts) * s.B * s.own
    seen = len(starts) * rows + own
    extra = s.H * len(starts) * (12 * s.B + rows * s.hidden)
    sweeps = {"forward": 1, "dq": 2}[kind]
    smallest = touched + 2 * row * s.G * (rows + s.B * s.Q * s.own)
    return smallest, touched + sweeps * (2 * row * s.H * seen + extra)


def compiles(name: str, shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Compile, ...]:
    """Forward and backward kernels for these shapes."""
    letters = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    found = []
    for s in shapes:
        for kind, of in PASSES:
            if of == "own" and not s.own:
                continue
            kernel, tile = KERNELS[kind], shipped_tiles(kind, s.K, dtype)
            sizes = {"H": s.H, "G": s.G, "K": s.K, "SHOWN": s.hidden, "OWN": s.own and of != "prefix"}
            constexprs = sizes | {n: tile[n] for n in ("BK", "BQ", "BN")}
            signature = {n: TYPES.get(n, f"*{letters}") for n in kernel.arg_names if n not in constexprs}
            smallest, actual = _bytes(kind, s, dtype, tile, of != "own")
            found.append(
                Compile(
                    name=f"{name} {kind} {of} {s.H}/{s.G} heads of {s.K} {letters}{' masked' * s.hidden}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=constexprs,
                    aligned=tuple(n for n, t in signature.items() if t.startswith("*") or n == "Q"),
                    num_warps=tile["num_warps"],
                    num_stages=tile["num_stages"],
                    min_occupancy=0.125,
                    streaming=False,
                    bytes_min=smallest,
                    bytes_actual=actual,
                    dot=dtype != torch.float32,
                )
            )
    return tuple(found)
