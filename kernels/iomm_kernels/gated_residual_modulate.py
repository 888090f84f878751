"""gated_residual_modulate: a gated residual connection and the next block's modulate in one pass.

    out = x + gate y,   h = n(out) (1 + scale) + shift           n: LayerNorm or RMSNorm without affine part
    backward, g = dh (1 + scale):   dx = dout + rstd (g - [mean(g)] - n(out) mean(g n(out)))
                                    dy = gate dx,  dgate = sum over tokens of dx y
                                    dshift = sum of dh,  dscale = sum of dh n(out)

Shapes: x, y, out, h (L, B, D), channels contiguous; gate, shift, scale (B, D), rows of any stride. In the
kernels W is D rounded up to a power of two, R the rows (tokens) of a tile.
Numerics: fp32; out is rounded before it is normalised, as if `gated_residual` and `modulate` ran in turn.
Sums over tokens as in `modulate`: the same bits every time.
Bytes: forward reads x and y and writes out and h, a read of out less than the two operators; backward reads
dout, dh, out and y and writes dx and dy.
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels import gated_residual as plain
from iomm_kernels import modulate as next_modulate
from iomm_kernels import shapes
from iomm_kernels.launch import jit, resolve, tensor_bytes, tl, triton, vjp
from iomm_kernels.norm_rows import check_inputs, input_gradient, row_statistics, tile, vectors
from iomm_kernels.record import Case, Compile, Op, draw

TILES = 8  # tiles of a forward program, which share the sample's vectors
SPLIT_TOKENS = 32  # tokens a backward program sums over
NUMBERS = 8  # of a tensor's tile a thread


# --- reference ------------------------------------------------------------------------------------------


def reference(
    x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, any floating dtype, differentiable."""
    out_LBD = plain.reference(x_LBD, gate_BD, y_LBD)
    return out_LBD, next_modulate.reference(out_LBD, shift_BD, scale_BD, norm, eps)


# --- forward --------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr, gate_ptr, y_ptr, shift_ptr, scale_ptr, out_ptr, h_ptr,
    tokens, samples, vector_stride, eps,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, W)
    inside = cols < D
    vector = b * vector_stride + cols
    gate = tl.load(gate_ptr + vector, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + vector, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + vector, mask=inside, other=0.0).to(tl.float32)
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        x_RW = tl.load(x_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        y_RW = tl.load(y_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        out_RW = (x_RW + gate[None, :] * y_RW).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset_RW, out_RW, mask=there_RW)
        n_RW, _ = row_statistics(out_RW.to(tl.float32), inside, D, eps, RMS)
        h_RW = n_RW * scale[None, :] + shift[None, :]
        tl.store(h_ptr + offset_RW, h_RW.to(h_ptr.dtype.element_ty), mask=there_RW)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Vectors as they are where all have contiguous channels and one row stride; else contiguous copies."""
    first = tensors[0].stride()
    if all(t.stride() == first for t in tensors) and first[-1] == 1:
        return tensors
    return tuple(t.contiguous() for t in tensors)


def _forward_triton(
    x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_LBD, y_LBD = x_LBD.contiguous(), y_LBD.contiguous()
    gate_BD, shift_BD, scale_BD = _alike(gate_BD, shift_BD, scale_BD)
    (L, B, D), out_LBD, h_LBD = x_LBD.shape, torch.empty_like(x_LBD), torch.empty_like(x_LBD)
    if out_LBD.numel():
        W, R, warps = tile(D, NUMBERS)
        _forward_kernel[(triton.cdiv(L, R * TILES), B)](
            x_LBD, gate_BD, y_LBD, shift_BD, scale_BD, out_LBD, h_LBD, L, B, gate_BD.stride(0), eps, D=D, W=W,
            R=R, TILES=TILES, RMS=norm == "rms", num_warps=warps,
        )  # fmt: skip
    return out_LBD, h_LBD


# --- backward -------------------------------------------------------------------------------------------


@jit
def _backward_kernel(
    dout_ptr, dh_ptr, out_ptr, y_ptr, gate_ptr, scale_ptr, dx_ptr, dy_ptr, partial_ptr,
    tokens, samples, vector_stride, eps,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, W)
    inside = cols < D
    gate = tl.load(gate_ptr + b * vector_stride + cols, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + b * vector_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.zeros((W,), tl.float32)
    dshift = tl.zeros((W,), tl.float32)
    dscale = tl.zeros((W,), tl.float32)
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        dh_RW = tl.load(dh_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        out_RW = tl.load(out_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        n_RW, rstd_R1 = row_statistics(out_RW, inside, D, eps, RMS)
        dshift += tl.sum(dh_RW, axis=0)
        dscale += tl.sum(dh_RW * n_RW, axis=0)
        dx_RW = input_gradient(dh_RW * scale[None, :], n_RW, rstd_R1, D, RMS)
        dx_RW += tl.load(dout_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset_RW, dx_RW.to(dx_ptr.dtype.element_ty), mask=there_RW)
        y_RW = tl.load(y_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        dgate += tl.sum(dx_RW * y_RW, axis=0)
        dy_RW = gate[None, :] * dx_RW
        tl.store(dy_ptr + offset_RW, dy_RW.to(dy_ptr.dtype.element_ty), mask=there_RW)
    partial_row = partial_ptr + (tl.program_id(0) * samples + b) * D + cols
    step = tl.num_programs(0) * samples * D
    tl.store(partial_row, dgate, mask=inside)
    tl.store(partial_row + step, dshift, mask=inside)
    tl.store(partial_row + 2 * step, dscale, mask=inside)


def _backward_triton(
    dout_LBD: Tensor, dh_LBD: Tensor, out_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, scale_BD: Tensor,
    norm: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dout_LBD, dh_LBD, y_LBD = dout_LBD.contiguous(), dh_LBD.contiguous(), y_LBD.contiguous()
    gate_BD, scale_BD = _alike(gate_BD, scale_BD)
    (L, B, D), grads = y_LBD.shape, y_LBD.new_empty(2, *y_LBD.shape)
    W, R, warps = tile(D, NUMBERS)
    tiles = max(1, SPLIT_TOKENS // R)
    splits = triton.cdiv(L, R * tiles)
    partial = torch.empty(3, splits, B, D, dtype=torch.float32, device=y_LBD.device)
    if grads.numel():
        _backward_kernel[(splits, B)](
            dout_LBD, dh_LBD, out_LBD, y_LBD, gate_BD, scale_BD, *grads, partial, L, B, gate_BD.stride(0),
            eps, D=D, W=W, R=R, TILES=tiles, RMS=norm == "rms", num_warps=warps,
        )  # fmt: skip
    return grads, partial.sum(1).to(gate_BD.dtype)


# --- autograd -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::gated_residual_modulate", mutates_args=())
def _fused(
    x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, norm: str,
    eps: float, provider: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = (x_LBD, gate_BD, y_LBD, shift_BD, scale_BD, norm, eps)
    chosen = resolve("gated_residual_modulate", provider, x_LBD.device.type, x_LBD.dtype)
    if chosen == "triton":
        return _forward_triton(*inputs)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.gated_residual_modulate(*inputs[:-2], norm == "rms", eps)
    out_LBD, h_LBD = reference(*inputs)
    return out_LBD.contiguous(), h_LBD.contiguous()


@_fused.register_fake
def _(x_LBD, gate_BD, y_LBD, shift_BD, scale_BD, norm, eps, provider):
    return x_LBD.new_empty(x_LBD.shape), x_LBD.new_empty(x_LBD.shape)


@torch.library.custom_op("iomm_kernels::gated_residual_modulate_backward", mutates_args=())
def _fused_backward(
    dout_LBD: Tensor, dh_LBD: Tensor, out_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, scale_BD: Tensor,
    norm: str, eps: float, provider: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and y, stacked (2, L, B, D), and of gate, shift and scale (3, B, D)."""
    name = "gated_residual_modulate_backward"
    chosen = resolve(name, provider, y_LBD.device.type, y_LBD.dtype)
    if chosen == "triton":
        return _backward_triton(dout_LBD, dh_LBD, out_LBD, gate_BD, y_LBD, scale_BD, norm, eps)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.gated_residual_modulate_backward(
            dout_LBD, dh_LBD, out_LBD, gate_BD, y_LBD, scale_BD, norm == "rms", eps
        )

    def function(out: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return next_modulate.reference(out, shift, scale, norm, eps)

    normed, dshift, dscale = vjp(function, (out_LBD, torch.zeros_like(scale_BD), scale_BD), dh_LBD)
    dx = dout_LBD + normed
    dy, dgate = vjp(torch.mul, (y_LBD, gate_BD), dx)
    return torch.stack((dx, dy)), torch.stack((dgate, dshift, dscale))


@_fused_backward.register_fake
def _(dout_LBD, dh_LBD, out_LBD, gate_BD, y_LBD, scale_BD, norm, eps, provider):
    return y_LBD.new_empty(2, *y_LBD.shape), gate_BD.new_empty(3, *gate_BD.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gate_BD, y_LBD, _, scale_BD, *ctx.settings = inputs
    ctx.save_for_backward(output[0], gate_BD, y_LBD, scale_BD)


def _differentiate(ctx: Any, dout_LBD: Tensor, dh_LBD: Tensor) -> tuple[Tensor | None, ...]:
    (dx, dy), (dgate, dshift, dscale) = _fused_backward(dout_LBD, dh_LBD, *ctx.saved_tensors, *ctx.settings)
    return dx, dgate, dy, dshift, dscale, None, None, None


_fused.register_autograd(_differentiate, setup_context=_setup)


# --- public function ------------------------------------------------------------------------------------


def gated_residual_modulate(
    x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, norm: str = "layer",
    eps: float = 1e-6, *, provider: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, h), both (L, B, D) in the dtype of x; differentiable in all tensors.

    Args:
        norm: "layer" or "rms", affine-free.
    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    name = "gated_residual_modulate"
    check_inputs(name, x_LBD, norm, gate=gate_BD, shift=shift_BD, scale=scale_BD)
    check_inputs(name, y_LBD, norm, gate=gate_BD)
    if y_LBD.shape != x_LBD.shape:
        raise ValueError(
            f"gated_residual_modulate: x {tuple(x_LBD.shape)} and y {tuple(y_LBD.shape)} have to be alike."
        )
    inputs = (x_LBD, gate_BD, y_LBD, shift_BD, scale_BD, norm, eps)
    chosen = resolve(name, provider, x_LBD.device.type, x_LBD.dtype)
    return reference(*inputs) if chosen == "eager" else _fused(*inputs, chosen)


# --- record ---------------------------------------------------------------------------------------------


def _case(name: str, L: int, B: int, D: int, norm: str = "layer") -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x_BLD, y_BLD = (draw(seed, B, L, D, dtype=dtype, device=device) for seed in (1, 3))
        gate, shift, scale = vectors(2, B, D, 3, dtype, device)
        return x_BLD.transpose(0, 1), gate, y_BLD.transpose(0, 1), shift, scale, norm

    return Case(name=name, make=make)


def _apart(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Vectors of two linears, as where one block ends and the next begins."""
    gate, (shift, scale) = draw(5, 2, 24, dtype=dtype, device=device), vectors(6, 2, 24, 2, dtype, device)
    x_LBD, y_LBD = (draw(seed, 3, 2, 24, dtype=dtype, device=device) for seed in (1, 3))
    return x_LBD, gate, y_LBD, shift, scale


def _bytes_moved(x_LBD: Tensor, *others: Any) -> int:
    return tensor_bytes(x_LBD, *others, x_LBD, x_LBD)


def _bytes_issued(x_LBD: Tensor, gate_BD: Tensor, *others: Any) -> int:
    reads = triton.cdiv(x_LBD.shape[0], tile(x_LBD.shape[-1], NUMBERS)[1] * TILES)
    return 4 * tensor_bytes(x_LBD) + 3 * reads * tensor_bytes(gate_BD)


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    step = shapes.step(preset, side_px)
    B, D = step.samples, step.hidden_size
    x_LBD, y_LBD = (draw(seed, step.tokens, B, D, dtype=dtype, device=device) for seed in (1, 3))
    gate, shift, scale = vectors(2, B, D, 3, dtype, device)
    return x_LBD, gate, y_LBD, shift, scale


def _compile(preset: str, norm: str, backward: bool) -> Compile:
    """At 512 px, bf16."""
    step = shapes.step(preset, 512)
    L, B, D = step.tokens, step.samples, step.hidden_size
    W, R, warps = tile(D, NUMBERS)
    tiles = max(1, SPLIT_TOKENS // R) if backward else TILES
    programs, row = triton.cdiv(L, R * tiles), 2 * L * B * D
    if backward:
        kernel, names = _backward_kernel, "dout dh out y gate scale dx dy"
        moved, minimum, actual = 6 * row, 5 * 2 * B * D, programs * (2 * 2 + 3 * 4) * B * D
    else:
        kernel, names = _forward_kernel, "x gate y shift scale out h"
        moved, minimum, actual = 4 * row, 3 * 2 * B * D, programs * 3 * 2 * B * D
    pointers = [f"{name}_ptr" for name in names.split()]
    partial = ["partial_ptr"] if backward else []
    return Compile(
        name=f"gated_residual_modulate {'backward' if backward else 'forward'} {norm} {D} bf16",
        kernel=kernel,
        signature=dict.fromkeys(pointers, "*bf16")
        | dict.fromkeys(partial, "*fp32")
        | dict.fromkeys(("tokens", "samples", "vector_stride"), "i32")
        | {"eps": "fp32"},
        constexprs={"D": D, "W": W, "R": R, "TILES": tiles, "RMS": norm == "rms"},
        aligned=(*pointers, *partial, "vector_stride"),
        num_warps=warps,
        min_occupancy=0.25 if backward else 0.5,
        streaming=True,
        bytes_min=moved + minimum,
        bytes_actual=moved + actual,
    )


OP = Op(
    name="gated_residual_modulate",
    fused=gated_residual_modulate,
    reference=reference,
    cases=(
        _case("one token", 1, 1, 8),
        _case("odd lengths", 5, 3, 24),
        _case("a width that is no power of two, rms", 3, 2, 40, "rms"),
        _case("several splits", 37, 1, 64),
        Case(name="vectors of two linears", make=_apart),
        _case("empty batch", 4, 0, 16),
        _case("no token", 0, 2, 16),
    ),
    differentiable=(0, 1, 2, 3, 4),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=tuple(
        _compile(preset, norm, backward)
        for preset, norm in (("b", "layer"), ("xl", "rms"))
        for backward in (False, True)
    ),
    bench=_bench,
)
