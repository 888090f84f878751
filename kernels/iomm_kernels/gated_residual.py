"""gated_residual: the residual connection of a block, gated by the sample's vector (adaLN-zero).

    out = x + gate y      backward: dx = dout,  dy = gate dout,  dgate = sum over tokens of dout y

Shapes: x, y, out (L, B, D), channels contiguous; gate (B, D), rows of any stride. In the kernels W is a part
of D, R the rows (tokens) of a tile.
Numerics: fp32, one rounding. dgate is summed as in `modulate`: the same bits every time.
Bytes: forward reads x and y and writes out; backward reads dout and y and writes dy (dx is dout itself).
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels import shapes
from iomm_kernels.launch import contiguous_rows, jit, next_power_of_2, resolve, tensor_bytes, tl, triton, vjp
from iomm_kernels.norm_rows import check_inputs, vectors
from iomm_kernels.record import Case, Compile, Op, draw

WIDTH, WARPS = 512, 2  # channels of a tile at most: 8 a thread, 128 bits of bf16
ROWS = 2
TILES, BACKWARD_TILES = 8, 16


# --- reference ------------------------------------------------------------------------------------------


def reference(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor) -> Tensor:
    """Plain PyTorch, any floating dtype, differentiable."""
    return x_LBD + gate_BD * y_LBD


# --- forward --------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr, gate_ptr, y_ptr, out_ptr,
    tokens, samples, gate_stride,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * W + tl.arange(0, W)
    inside = cols < D
    gate = tl.load(gate_ptr + b * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        x_RW = tl.load(x_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        y_RW = tl.load(y_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        out_RW = x_RW + gate[None, :] * y_RW
        tl.store(out_ptr + offset_RW, out_RW.to(out_ptr.dtype.element_ty), mask=there_RW)


def _forward_triton(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor) -> Tensor:
    x_LBD, gate_BD, y_LBD = x_LBD.contiguous(), contiguous_rows(gate_BD), y_LBD.contiguous()
    (L, B, D), out_LBD = x_LBD.shape, torch.empty_like(x_LBD)
    if out_LBD.numel():
        W = min(WIDTH, next_power_of_2(D))
        _forward_kernel[(triton.cdiv(L, ROWS * TILES), B, triton.cdiv(D, W))](
            x_LBD, gate_BD, y_LBD, out_LBD, L, B, gate_BD.stride(0), D=D, W=W, R=ROWS, TILES=TILES,
            num_warps=WARPS,
        )  # fmt: skip
    return out_LBD


# --- backward -------------------------------------------------------------------------------------------


@jit
def _backward_kernel(
    dout_ptr, gate_ptr, y_ptr, dy_ptr, partial_ptr,
    tokens, samples, gate_stride,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * W + tl.arange(0, W)
    inside = cols < D
    gate = tl.load(gate_ptr + b * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dgate_RW = tl.zeros((R, W), tl.float32)
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        dout_RW = tl.load(dout_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        y_RW = tl.load(y_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        dgate_RW += dout_RW * y_RW
        dy_RW = gate[None, :] * dout_RW
        tl.store(dy_ptr + offset_RW, dy_RW.to(dy_ptr.dtype.element_ty), mask=there_RW)
    tl.store(partial_ptr + (tl.program_id(0) * samples + b) * D + cols, tl.sum(dgate_RW, axis=0), mask=inside)


def _backward_triton(dout_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor) -> tuple[Tensor, Tensor]:
    dout_LBD, gate_BD, y_LBD = dout_LBD.contiguous(), contiguous_rows(gate_BD), y_LBD.contiguous()
    (L, B, D), dy_LBD = y_LBD.shape, torch.empty_like(y_LBD)
    splits = triton.cdiv(L, ROWS * BACKWARD_TILES)
    partial = torch.empty(splits, B, D, dtype=torch.float32, device=y_LBD.device)
    if dy_LBD.numel():
        W = min(WIDTH, next_power_of_2(D))
        _backward_kernel[(splits, B, triton.cdiv(D, W))](
            dout_LBD, gate_BD, y_LBD, dy_LBD, partial, L, B, gate_BD.stride(0), D=D, W=W, R=ROWS,
            TILES=BACKWARD_TILES, num_warps=WARPS,
        )  # fmt: skip
    return dy_LBD, partial.sum(0).to(gate_BD.dtype)


# --- autograd -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::gated_residual", mutates_args=())
def _gated_residual(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, provider: str) -> Tensor:
    chosen = resolve("gated_residual", provider, x_LBD.device.type, x_LBD.dtype)
    if chosen == "triton":
        return _forward_triton(x_LBD, gate_BD, y_LBD)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.gated_residual(x_LBD, gate_BD, y_LBD)
    return reference(x_LBD, gate_BD, y_LBD).contiguous()


@_gated_residual.register_fake
def _(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, provider: str) -> Tensor:
    return x_LBD.new_empty(x_LBD.shape)


@torch.library.custom_op("iomm_kernels::gated_residual_backward", mutates_args=())
def _gated_residual_backward(
    dout_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, provider: str
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate."""
    chosen = resolve("gated_residual_backward", provider, y_LBD.device.type, y_LBD.dtype)
    if chosen == "triton":
        return _backward_triton(dout_LBD, gate_BD, y_LBD)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.gated_residual_backward(dout_LBD, gate_BD, y_LBD)
    dy, dgate = vjp(torch.mul, (y_LBD, gate_BD), dout_LBD)
    return dy.contiguous(), dgate


@_gated_residual_backward.register_fake
def _(dout_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    return y_LBD.new_empty(y_LBD.shape), gate_BD.new_empty(gate_BD.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, gate_BD, y_LBD, ctx.provider = inputs
    ctx.save_for_backward(gate_BD, y_LBD)


def _differentiate(ctx: Any, dout_LBD: Tensor) -> tuple[Tensor | None, ...]:
    dy, dgate = _gated_residual_backward(dout_LBD, *ctx.saved_tensors, ctx.provider)
    return dout_LBD, dgate, dy, None


_gated_residual.register_autograd(_differentiate, setup_context=_setup)


# --- public function ------------------------------------------------------------------------------------


def gated_residual(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor, *, provider: str = "auto") -> Tensor:
    """x + gate y -> (L, B, D) in the dtype of x; differentiable in all three.

    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    check_inputs("gated_residual", x_LBD, gate=gate_BD)
    check_inputs("gated_residual", y_LBD, gate=gate_BD)
    if y_LBD.shape != x_LBD.shape:
        raise ValueError(
            f"gated_residual: x {tuple(x_LBD.shape)} and y {tuple(y_LBD.shape)} have to be alike."
        )
    chosen = resolve("gated_residual", provider, x_LBD.device.type, x_LBD.dtype)
    if chosen == "eager":
        return reference(x_LBD, gate_BD, y_LBD)
    return _gated_residual(x_LBD, gate_BD, y_LBD, chosen)


# --- record ---------------------------------------------------------------------------------------------


def _case(name: str, L: int, B: int, D: int) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x_BLD, y_BLD = (draw(seed, B, L, D, dtype=dtype, device=device) for seed in (1, 3))
        return x_BLD.transpose(0, 1), vectors(2, B, D, 3, dtype, device)[1], y_BLD.transpose(0, 1)

    return Case(name=name, make=make)


def _bytes_moved(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor) -> int:
    return tensor_bytes(x_LBD, gate_BD, y_LBD, x_LBD)


def _bytes_issued(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor) -> int:
    reads = triton.cdiv(x_LBD.shape[0], ROWS * TILES)
    return tensor_bytes(x_LBD, y_LBD, x_LBD) + reads * tensor_bytes(gate_BD)


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    step = shapes.step(preset, side_px)
    B, D = step.samples, step.hidden_size
    x_LBD, y_LBD = (draw(seed, step.tokens, B, D, dtype=dtype, device=device) for seed in (1, 3))
    return x_LBD, vectors(2, B, D, 3, dtype, device)[1], y_LBD


def _compile(kernel: Any, pointers: str, tiles: int, sums: bool) -> Compile:
    """At 1280 tokens of 16 samples of width 1536, bf16."""
    step = shapes.step("b", 512)
    L, B, D, size = step.tokens, step.samples, step.hidden_size, 2
    numbers, programs = L * B * D, triton.cdiv(L, ROWS * tiles)
    names = [f"{name}_ptr" for name in pointers.split()]
    return Compile(
        name=f"gated_residual {'backward' if sums else 'forward'} {D} bf16",
        kernel=kernel,
        signature=dict.fromkeys(names, "*bf16")
        | ({"partial_ptr": "*fp32"} if sums else {})
        | dict.fromkeys(("tokens", "samples", "gate_stride"), "i32"),
        constexprs={"D": D, "W": WIDTH, "R": ROWS, "TILES": tiles},
        aligned=(*names, "gate_stride", *(("partial_ptr",) if sums else ())),
        num_warps=WARPS,
        min_occupancy=0.5,
        streaming=True,
        bytes_min=size * (3 * numbers + (1 + sums) * B * D),
        bytes_actual=size * (3 * numbers + programs * B * D) + sums * programs * 4 * B * D,
    )


OP = Op(
    name="gated_residual",
    fused=gated_residual,
    reference=reference,
    cases=(
        _case("one token", 1, 1, 8),
        _case("odd lengths", 5, 3, 24),
        _case("two column tiles", 3, 1, 520),
        _case("several splits", 35, 1, 8),
        _case("empty batch", 4, 0, 16),
        _case("no token", 0, 2, 16),
    ),
    differentiable=(0, 1, 2),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=(
        _compile(_forward_kernel, "x gate y out", TILES, False),
        _compile(_backward_kernel, "dout gate y dy", BACKWARD_TILES, True),
    ),
    bench=_bench,
)
