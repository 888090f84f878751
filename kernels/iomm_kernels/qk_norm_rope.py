"""qk_norm_rope: RMSNorm over a head's channels and rotary positions, for queries and keys in one launch.

    n = w x rstd,  rstd = 1 / sqrt(mean(x^2) + eps)      over the K channels of a head; w: one a channel
    y[2i], y[2i+1] = n[2i] cos - n[2i+1] sin, n[2i] sin + n[2i+1] cos          pair i turned by its angle
    backward: d = dy turned back;  dw = sum of d x rstd;  g = w d;  dx = rstd (g - x rstd mean(g x rstd))

Shapes: q, k, and what they become, (L, B, H, K), K even; cos, sin (L, P) with P = K / 2 pairs of the three
axes, or (L, B, P) where samples differ (`iomm.model.rope`). q and k may be views into one projection. A row
is a token of a sample.
Numerics: fp32, one rounding. dw is a sum of partial sums in a fixed order: the same bits every time.
Bytes: forward reads and writes q and k; backward reads both and their gradients and writes two. The tables
are read once for q and once for k.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iomm_kernels import shapes
from iomm_kernels.launch import jit, next_power_of_2, resolve, tensor_bytes, tl, triton, vjp
from iomm_kernels.record import Case, Compile, Op, draw

ROWS, BACKWARD_ROWS = 4, 16  # rows of a program, one after the other; a backward one sums over them


# --- reference ------------------------------------------------------------------------------------------


def reference(
    q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, any floating dtype, differentiable in all but the tables."""
    cos, sin = (part[:, None, None] if part.ndim == 2 else part[:, :, None] for part in (cos_LP, sin_LP))
    turned = []
    for x, weight in ((q_LBHK, q_weight_K), (k_LBHK, k_weight_K)):
        n = functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        even, odd = n.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        turned.append(pairs.flatten(-2).to(x.dtype))
    return turned[0], turned[1]


# --- forward --------------------------------------------------------------------------------------------


@jit
def _turn(x_HK, cos_HP, sin_HP):
    """Turn neighbouring channels by their angle."""
    even, odd = tl.split(tl.reshape(x_HK, (x_HK.shape[0], x_HK.shape[1] // 2, 2)))
    pairs = tl.join(even * cos_HP - odd * sin_HP, even * sin_HP + odd * cos_HP)
    return tl.reshape(pairs, x_HK.shape)


@jit
def _load_angles(cos_ptr, sin_ptr, row, there, K: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """cos and sin of a row, the same for all heads: read so that each thread gets its own pairs."""
    pair_HP = tl.arange(0, HEADS)[:, None] * 0 + tl.arange(0, WIDTH // 2)[None, :]
    there = (pair_HP < K // 2) & there
    at_HP = row.to(tl.int64) * (K // 2) + pair_HP
    return tl.load(cos_ptr + at_HP, mask=there, other=0.0), tl.load(sin_ptr + at_HP, mask=there, other=0.0)


@jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    rows, rows_a_table_row, row_stride, head_stride, eps,
    H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = next_power_of_2(H)
    WIDTH: tl.constexpr = next_power_of_2(K)
    x_ptr, weight_ptr, out_ptr = q_ptr, q_weight_ptr, q_out_ptr
    if tl.program_id(1) == 1:
        x_ptr, weight_ptr, out_ptr = k_ptr, k_weight_ptr, k_out_ptr
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < H) & (channel < K)
    weight = tl.load(weight_ptr + head * 0 + channel, mask=inside, other=0.0).to(tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        there = inside & (row < rows)
        x_at = row.to(tl.int64) * row_stride + head * head_stride + channel
        x_HK = tl.load(x_ptr + x_at, mask=there, other=0.0).to(tl.float32)
        rstd_H1 = (1.0 / tl.sqrt(tl.sum(x_HK * x_HK, axis=1) / K + eps))[:, None]
        cos, sin = _load_angles(cos_ptr, sin_ptr, row // rows_a_table_row, row < rows, K, HEADS, WIDTH)
        y_HK = _turn(x_HK * rstd_H1 * weight, cos, sin)
        out_at = (row.to(tl.int64) * H + head) * K + channel
        tl.store(out_ptr + out_at, y_HK.to(out_ptr.dtype.element_ty), mask=there)


def _warps(H: int, K: int) -> int:
    """Of a program: 16 numbers a thread."""
    return max(1, min(8, next_power_of_2(H) * next_power_of_2(K) // 512))


def _rows(q_LBHK: Tensor, k_LBHK: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """q and k as they are where one step leads from row to row and one from head to head, as in views of one
    projection; else contiguous copies. And those steps."""
    strides = q_LBHK.stride()
    even = strides[0] == strides[1] * q_LBHK.shape[1] and strides[3] == 1
    if not even or k_LBHK.stride() != strides:
        q_LBHK, k_LBHK = q_LBHK.contiguous(), k_LBHK.contiguous()
    return q_LBHK, k_LBHK, q_LBHK.stride(1), q_LBHK.stride(2)


def _tables(cos_LP: Tensor, sin_LP: Tensor, samples: int) -> tuple[Tensor, Tensor, int]:
    """The tables, and how many rows share one of theirs."""
    return cos_LP.float().contiguous(), sin_LP.float().contiguous(), samples if cos_LP.ndim == 2 else 1


def _forward_triton(
    q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    L, B, H, K = q_LBHK.shape
    q_out, k_out = (x.new_empty(x.shape) for x in (q_LBHK, k_LBHK))
    if q_out.numel():
        q, k, row_stride, head_stride = _rows(q_LBHK, k_LBHK)
        _forward_kernel[(triton.cdiv(L * B, ROWS), 2)](
            q, k, q_weight_K.contiguous(), k_weight_K.contiguous(), *_tables(cos_LP, sin_LP, B)[:2], q_out,
            k_out, L * B, _tables(cos_LP, sin_LP, B)[2], row_stride, head_stride, eps, H=H, K=K, ROWS=ROWS,
            num_warps=_warps(H, K),
        )  # fmt: skip
    return q_out, k_out


# --- backward -------------------------------------------------------------------------------------------


@jit
def _backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dx_ptr,
    partial_ptr,
    rows, rows_a_table_row, row_stride, head_stride, eps,
    H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = next_power_of_2(H)
    WIDTH: tl.constexpr = next_power_of_2(K)
    dy_ptr, x_ptr, weight_ptr = dq_out_ptr, q_ptr, q_weight_ptr
    if tl.program_id(1) == 1:
        dy_ptr, x_ptr, weight_ptr = dk_out_ptr, k_ptr, k_weight_ptr
    dx_ptr += tl.program_id(1).to(tl.int64) * rows * (H * K)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < H) & (channel < K)
    weight = tl.load(weight_ptr + head * 0 + channel, mask=inside, other=0.0).to(tl.float32)
    dweight_HK = tl.zeros((HEADS, WIDTH), tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        there = inside & (row < rows)
        x_at = row.to(tl.int64) * row_stride + head * head_stride + channel
        x_HK = tl.load(x_ptr + x_at, mask=there, other=0.0).to(tl.float32)
        rstd_H1 = (1.0 / tl.sqrt(tl.sum(x_HK * x_HK, axis=1) / K + eps))[:, None]
        x_HK *= rstd_H1  # from here on, normalised
        y_at = (row.to(tl.int64) * H + head) * K + channel
        dy_HK = tl.load(dy_ptr + y_at, mask=there, other=0.0).to(tl.float32)
        cos, sin = _load_angles(cos_ptr, sin_ptr, row // rows_a_table_row, row < rows, K, HEADS, WIDTH)
        d_HK = _turn(dy_HK, cos, -sin)
        dweight_HK += d_HK * x_HK
        g_HK = d_HK * weight
        dx_HK = rstd_H1 * (g_HK - x_HK * (tl.sum(g_HK * x_HK, axis=1) / K)[:, None])
        tl.store(dx_ptr + y_at, dx_HK.to(dx_ptr.dtype.element_ty), mask=there)
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * K + tl.arange(0, WIDTH)
    tl.store(partial_ptr + at, tl.sum(dweight_HK, axis=0), mask=tl.arange(0, WIDTH) < K)


def _backward_triton(
    dq_LBHK: Tensor, dk_LBHK: Tensor, q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor,
    k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    L, B, H, K = q_LBHK.shape
    dx = q_LBHK.new_empty(2, *q_LBHK.shape)
    programs = triton.cdiv(L * B, BACKWARD_ROWS)
    partial = torch.empty(2, programs, K, dtype=torch.float32, device=dx.device)
    if dx.numel():
        q, k, row_stride, head_stride = _rows(q_LBHK, k_LBHK)
        _backward_kernel[(programs, 2)](
            dq_LBHK.contiguous(), dk_LBHK.contiguous(), q, k, q_weight_K.contiguous(),
            k_weight_K.contiguous(), *_tables(cos_LP, sin_LP, B)[:2], dx, partial, L * B,
            _tables(cos_LP, sin_LP, B)[2], row_stride, head_stride, eps, H=H, K=K, ROWS=BACKWARD_ROWS,
            num_warps=_warps(H, K),
        )  # fmt: skip
    return dx, partial.sum(1).to(q_weight_K.dtype)


# --- autograd -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    eps: float, provider: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = (q_LBHK, k_LBHK, q_weight_K, k_weight_K, cos_LP, sin_LP, eps)
    if resolve("qk_norm_rope", provider, q_LBHK.device.type, q_LBHK.dtype) == "triton":
        return _forward_triton(*inputs)
    return reference(*inputs)


@_qk_norm_rope.register_fake
def _(q_LBHK, k_LBHK, q_weight_K, k_weight_K, cos_LP, sin_LP, eps, provider):
    return q_LBHK.new_empty(q_LBHK.shape), k_LBHK.new_empty(k_LBHK.shape)


@torch.library.custom_op("iomm_kernels::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dq_LBHK: Tensor, dk_LBHK: Tensor, q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor,
    k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor, eps: float, provider: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of q and k, stacked (2, L, B, H, K), and of their weights (2, K)."""
    inputs, tables = (q_LBHK, k_LBHK, q_weight_K, k_weight_K), (cos_LP, sin_LP, eps)
    if resolve("qk_norm_rope_backward", provider, q_LBHK.device.type, q_LBHK.dtype) == "triton":
        return _backward_triton(dq_LBHK, dk_LBHK, *inputs, *tables)
    dq, dk, dq_weight, dk_weight = vjp(
        lambda q, k, u, w: reference(q, k, u, w, *tables), inputs, (dq_LBHK, dk_LBHK)
    )
    return torch.stack((dq, dk)), torch.stack((dq_weight, dk_weight))


@_qk_norm_rope_backward.register_fake
def _(dq_LBHK, dk_LBHK, q_LBHK, k_LBHK, q_weight_K, k_weight_K, cos_LP, sin_LP, eps, provider):
    return q_LBHK.new_empty(2, *q_LBHK.shape), q_weight_K.new_empty(2, *q_weight_K.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.provider = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dq_LBHK: Tensor, dk_LBHK: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = _qk_norm_rope_backward(dq_LBHK, dk_LBHK, *ctx.saved_tensors, ctx.eps, ctx.provider)
    return *dx, *dweight, None, None, None, None


_qk_norm_rope.register_autograd(_differentiate, setup_context=_setup)


# --- public function ------------------------------------------------------------------------------------


def qk_norm_rope(
    q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    eps: float = 1e-6, *, provider: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k, normalised and turned, contiguous; differentiable in q, k and the weights.

    Args:
        cos_LP: of each pair's angle, fp32; (L, B, P) where samples differ.
    Raises:
        ValueError: shapes do not fit, or the provider cannot serve here.
    """
    K, table = q_LBHK.shape[-1], (*q_LBHK.shape[: cos_LP.ndim - 1], q_LBHK.shape[-1] // 2)
    if (
        q_LBHK.ndim != 4
        or k_LBHK.shape != q_LBHK.shape
        or K % 2
        or not q_weight_K.shape == k_weight_K.shape == (K,)
    ):
        raise ValueError(
            f"qk_norm_rope: q {tuple(q_LBHK.shape)} and k {tuple(k_LBHK.shape)} have to be alike, "
            f"(L, B, H, K) with K even, and the weights {tuple(q_weight_K.shape)} and "
            f"{tuple(k_weight_K.shape)} (K,)."
        )
    if cos_LP.ndim not in (2, 3) or cos_LP.shape != table or sin_LP.shape != table:
        raise ValueError(
            f"qk_norm_rope: cos {tuple(cos_LP.shape)} and sin {tuple(sin_LP.shape)} have to be (L, K / 2) or "
            f"(L, B, K / 2) for q {tuple(q_LBHK.shape)}."
        )
    inputs = (q_LBHK, k_LBHK, q_weight_K, k_weight_K, cos_LP, sin_LP, eps)
    chosen = resolve("qk_norm_rope", provider, q_LBHK.device.type, q_LBHK.dtype)
    return reference(*inputs) if chosen == "eager" else _qk_norm_rope(*inputs, chosen)


# --- record ---------------------------------------------------------------------------------------------


def _inputs(
    L: int, B: int, H: int, K: int, dtype: torch.dtype, device: torch.device, samples_differ: bool = False
) -> tuple[Any, ...]:
    """q and k as views into one projection, as the model has them."""
    q, k, _ = draw(1, L, B, H, 3, K, dtype=dtype, device=device).unbind(-2)
    weights = (1 + draw(seed, K, dtype=dtype, device=device) / 8 for seed in (2, 3))
    table = (L, B, K // 2) if samples_differ else (L, K // 2)
    angle = 3 * draw(4, *table, dtype=torch.float32, device=device)
    return q, k, *weights, angle.cos(), angle.sin()


def _case(name: str, L: int, B: int, H: int, K: int, *, samples_differ: bool = False) -> Case:
    return Case(name=name, make=lambda dtype, device: _inputs(L, B, H, K, dtype, device, samples_differ))


def _swapped(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    q, k, *rest = _inputs(3, 2, 2, 8, dtype, device)
    return q.transpose(0, 1).contiguous().transpose(0, 1), k, *rest


def _bytes_moved(q_LBHK: Tensor, k_LBHK: Tensor, *others: Any) -> int:
    return 2 * tensor_bytes(q_LBHK, k_LBHK) + tensor_bytes(*others)


def _bytes_issued(q_LBHK: Tensor, k_LBHK: Tensor, q_weight_K: Tensor, *others: Any) -> int:
    rows, K = q_LBHK.shape[0] * q_LBHK.shape[1], q_LBHK.shape[-1]
    weights = 2 * triton.cdiv(rows, ROWS) * tensor_bytes(q_weight_K)
    return 2 * tensor_bytes(q_LBHK, k_LBHK) + weights + 2 * rows * K * 4


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    step = shapes.step(preset, side_px)
    return _inputs(step.tokens, step.samples, step.heads, step.head_size, dtype, device)


def _compile(kernel: Any, preset: str, tensors: str, rows: int, backward: bool) -> Compile:
    """At 512 px, bf16, with fp32 weights."""
    step = shapes.step(preset, 512)
    H, K, total = step.heads, step.head_size, step.tokens * step.samples
    names = [f"{name}_ptr" for name in tensors.split()]
    singles = ["q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", *(["partial_ptr"] if backward else [])]
    programs, passes = triton.cdiv(total, rows), 6 if backward else 4
    moved, weights = passes * 2 * total * H * K, 2 * 4 * K * (1 + backward)
    return Compile(
        name=f"qk_norm_rope {'backward' if backward else 'forward'} {H} x {K} bf16",
        kernel=kernel,
        signature=dict.fromkeys(names, "*bf16")
        | dict.fromkeys(singles, "*fp32")
        | dict.fromkeys(("rows", "rows_a_table_row", "row_stride", "head_stride"), "i32")
        | {"eps": "fp32"},
        constexprs={"H": H, "K": K, "ROWS": rows},
        aligned=(*names, *singles, "row_stride", "head_stride"),
        num_warps=_warps(H, K),
        min_occupancy=0.25 if backward else 0.5,
        streaming=True,
        scalars=int(backward),  # a thread's part of the partial sum, once a program
        bytes_min=moved + weights + step.tokens * K * 4,
        bytes_actual=moved + programs * weights + 2 * total * K * 4,
    )


OP = Op(
    name="qk_norm_rope",
    fused=qk_norm_rope,
    reference=reference,
    cases=(
        _case("one token", 1, 1, 1, 2),
        _case("odd lengths", 5, 3, 3, 8),
        _case("heads and channels no power of two", 3, 2, 5, 24),
        _case("samples that differ in position", 3, 2, 2, 16, samples_differ=True),
        _case("several programs", 21, 1, 1, 8),
        Case(name="queries and keys laid out differently", make=_swapped),
        _case("empty batch", 4, 0, 2, 8),
    ),
    differentiable=(0, 1, 2, 3),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=tuple(
        compiled
        for preset in ("b", "xl")
        for compiled in (
            _compile(_forward_kernel, preset, "q k q_out k_out", ROWS, False),
            _compile(_backward_kernel, preset, "dq_out dk_out q k dx", BACKWARD_ROWS, True),
        )
    ),
    bench=_bench,
)
