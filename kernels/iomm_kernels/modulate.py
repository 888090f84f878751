"""modulate: affine-free LayerNorm or RMSNorm, then scale and shift by the sample's vectors (adaLN).

    y = n(x) (1 + scale) + shift     LayerNorm: n(x) = (x - mean) rstd, rstd = 1 / sqrt(var + eps)
                                     RMSNorm:   n(x) = x rstd,          rstd = 1 / sqrt(mean(x^2) + eps)
    backward, g = dy (1 + scale):    dx = rstd (g - [mean(g]) - n(x) mean(g n(x)))    [..] LayerNorm only
                                     dshift = sum over tokens of dy,  dscale = sum over tokens of dy n(x)

Shapes: x, y (L, B, D), channels contiguous; scale, shift (B, D), rows of any stride (chunks of one linear);
In the kernels W is D rounded up to a power of two, R the rows (tokens) of a tile.
Numerics: statistics (computed again by the backward pass) and sums in fp32, one rounding at the end. The
sums over tokens are partial sums of a fixed split, added in a fixed order: the same bits every time.
Bytes: forward reads x and writes y; backward reads dy and x and writes dx. The vectors and the partial sums
(fp32, a row of each every SPLIT_TOKENS tokens) come to about 10 % more.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iomm_kernels import shapes
from iomm_kernels.launch import contiguous_rows, jit, resolve, tensor_bytes, tl, triton, vjp
from iomm_kernels.norm_rows import check_inputs, input_gradient, row_statistics, tile, vectors
from iomm_kernels.record import Case, Compile, Op, draw

SPLIT_TOKENS = 32  # tokens a backward program sums over
TILES = 4  # tiles of a forward program, which share the sample's vectors
FORWARD_NUMBERS, BACKWARD_NUMBERS = 16, 8  # of a tensor's tile a thread: half the warps stay resident


# --- reference ------------------------------------------------------------------------------------------


def reference(
    x_LBD: Tensor,
    shift_BD: Tensor | None,
    scale_BD: Tensor,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """Plain PyTorch, any floating dtype, differentiable."""
    normalise = functional.layer_norm if norm == "layer" else functional.rms_norm
    y_LBD = normalise(x_LBD, x_LBD.shape[-1:], eps=eps) * (1 + scale_BD)
    return y_LBD if shift_BD is None else y_LBD + shift_BD


# --- forward --------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr,
    tokens, samples, shift_stride, scale_stride, eps,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, RMS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, W)
    inside = cols < D
    scale = 1.0 + tl.load(scale_ptr + b * scale_stride + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros((W,), tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + b * shift_stride + cols, mask=inside, other=0.0).to(tl.float32)
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        x_RW = tl.load(x_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        n_RW, _ = row_statistics(x_RW, inside, D, eps, RMS)
        y_RW = n_RW * scale[None, :] + shift[None, :]
        tl.store(y_ptr + offset_RW, y_RW.to(y_ptr.dtype.element_ty), mask=there_RW)


def _forward_triton(
    x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, norm: str, eps: float
) -> Tensor:
    x_LBD, scale_BD = x_LBD.contiguous(), contiguous_rows(scale_BD)
    shift = scale_BD if shift_BD is None else contiguous_rows(shift_BD)
    (L, B, D), y_LBD = x_LBD.shape, torch.empty_like(x_LBD)
    if y_LBD.numel():
        W, R, warps = tile(D, FORWARD_NUMBERS)
        _forward_kernel[(triton.cdiv(L, R * TILES), B)](
            x_LBD, shift, scale_BD, y_LBD, L, B, shift.stride(0), scale_BD.stride(0), eps, D=D,
            W=W, R=R, TILES=TILES, RMS=norm == "rms", SHIFT=shift_BD is not None, num_warps=warps,
        )  # fmt: skip
    return y_LBD


# --- backward -------------------------------------------------------------------------------------------


@jit
def _backward_kernel(
    dy_ptr, x_ptr, scale_ptr, dx_ptr, partial_ptr,
    tokens, samples, scale_stride, eps,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, W)
    inside = cols < D
    scale = 1.0 + tl.load(scale_ptr + b * scale_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros((W,), tl.float32)
    dscale = tl.zeros((W,), tl.float32)
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        dy_RW = tl.load(dy_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        x_RW = tl.load(x_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        n_RW, rstd_R1 = row_statistics(x_RW, inside, D, eps, RMS)
        dshift += tl.sum(dy_RW, axis=0)
        dscale += tl.sum(dy_RW * n_RW, axis=0)
        dx_RW = input_gradient(dy_RW * scale[None, :], n_RW, rstd_R1, D, RMS)
        tl.store(dx_ptr + offset_RW, dx_RW.to(dx_ptr.dtype.element_ty), mask=there_RW)
    partial_row = partial_ptr + (tl.program_id(0) * samples + b) * D + cols
    tl.store(partial_row, dshift, mask=inside)
    tl.store(partial_row + tl.num_programs(0) * samples * D, dscale, mask=inside)


def _backward_triton(
    dy_LBD: Tensor, x_LBD: Tensor, scale_BD: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    dy_LBD, x_LBD, scale_BD = dy_LBD.contiguous(), x_LBD.contiguous(), contiguous_rows(scale_BD)
    (L, B, D), dx_LBD = x_LBD.shape, torch.empty_like(x_LBD)
    W, R, warps = tile(D, BACKWARD_NUMBERS)
    tiles = max(1, SPLIT_TOKENS // R)
    splits = triton.cdiv(L, R * tiles)
    partial = torch.empty(2, splits, B, D, dtype=torch.float32, device=x_LBD.device)
    if dx_LBD.numel():
        _backward_kernel[(splits, B)](
            dy_LBD, x_LBD, scale_BD, dx_LBD, partial, L, B, scale_BD.stride(0), eps, D=D, W=W, R=R,
            TILES=tiles, RMS=norm == "rms", num_warps=warps,
        )  # fmt: skip
    return dx_LBD, partial.sum(1).to(scale_BD.dtype)


# --- autograd -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::modulate", mutates_args=())
def _modulate(
    x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, norm: str, eps: float, provider: str
) -> Tensor:
    chosen = resolve("modulate", provider, x_LBD.device.type, x_LBD.dtype)
    if chosen == "triton":
        return _forward_triton(x_LBD, shift_BD, scale_BD, norm, eps)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.modulate(x_LBD, shift_BD, scale_BD, norm == "rms", eps)
    return reference(x_LBD, shift_BD, scale_BD, norm, eps).contiguous()


@_modulate.register_fake
def _(
    x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, norm: str, eps: float, provider: str
) -> Tensor:
    return x_LBD.new_empty(x_LBD.shape)


@torch.library.custom_op("iomm_kernels::modulate_backward", mutates_args=())
def _modulate_backward(
    dy_LBD: Tensor, x_LBD: Tensor, scale_BD: Tensor, norm: str, eps: float, provider: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, stacked (2, B, D), of shift and scale."""
    chosen = resolve("modulate_backward", provider, x_LBD.device.type, x_LBD.dtype)
    if chosen == "triton":
        return _backward_triton(dy_LBD, x_LBD, scale_BD, norm, eps)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.modulate_backward(dy_LBD, x_LBD, scale_BD, norm == "rms", eps)

    def function(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return reference(x, shift, scale, norm, eps)

    dx, dshift, dscale = vjp(function, (x_LBD, torch.zeros_like(scale_BD), scale_BD), dy_LBD)
    return dx.contiguous(), torch.stack((dshift, dscale))


@_modulate_backward.register_fake
def _(
    dy_LBD: Tensor, x_LBD: Tensor, scale_BD: Tensor, norm: str, eps: float, provider: str
) -> tuple[Tensor, Tensor]:
    return x_LBD.new_empty(x_LBD.shape), scale_BD.new_empty(2, *scale_BD.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_LBD, shift_BD, scale_BD, *ctx.settings = inputs
    ctx.shifted = shift_BD is not None
    ctx.save_for_backward(x_LBD, scale_BD)


def _differentiate(ctx: Any, dy_LBD: Tensor) -> tuple[Tensor | None, ...]:
    x_LBD, scale_BD = ctx.saved_tensors
    dx, (dshift, dscale) = _modulate_backward(dy_LBD, x_LBD, scale_BD, *ctx.settings)
    return dx, dshift if ctx.shifted else None, dscale, None, None, None


_modulate.register_autograd(_differentiate, setup_context=_setup)


# --- public function ------------------------------------------------------------------------------------


def modulate(
    x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, norm: str = "layer", eps: float = 1e-6, *,
    provider: str = "auto",
) -> Tensor:  # fmt: skip
    """n(x) (1 + scale) + shift -> (L, B, D) in the dtype of x; differentiable in x, shift and scale.

    Args:
        shift_BD: None adds nothing (Z-Image's blocks).
        norm: "layer" or "rms", affine-free.
    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    check_inputs("modulate", x_LBD, norm, shift=shift_BD, scale=scale_BD)
    chosen = resolve("modulate", provider, x_LBD.device.type, x_LBD.dtype)
    if chosen == "eager":
        return reference(x_LBD, shift_BD, scale_BD, norm, eps)
    return _modulate(x_LBD, shift_BD, scale_BD, norm, eps, chosen)


# --- record ---------------------------------------------------------------------------------------------


def _case(name: str, L: int, B: int, D: int, norm: str = "layer", shift: bool = True, far: float = 0) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x_BLD = draw(1, B, L, D, dtype=dtype, device=device) + far
        shift_BD, scale_BD = vectors(2, B, D, 2, dtype, device)
        return x_BLD.transpose(0, 1), shift_BD if shift else None, scale_BD, norm

    return Case(name=name, make=make)


def _bytes_moved(x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, *_: Any) -> int:
    return tensor_bytes(x_LBD, shift_BD, scale_BD, x_LBD)


def vector_reads(x_LBD: Tensor, tokens: int) -> int:
    """How often a sample's vectors are read when a program takes this many tokens."""
    return triton.cdiv(x_LBD.shape[0], tokens)


def _bytes_issued(x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, *_: Any) -> int:
    reads = vector_reads(x_LBD, tile(x_LBD.shape[-1], FORWARD_NUMBERS)[1] * TILES)
    return tensor_bytes(x_LBD, x_LBD) + reads * tensor_bytes(shift_BD, scale_BD)


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    step = shapes.step(preset, side_px)
    D, B = step.hidden_size, step.samples
    x_LBD = draw(1, step.tokens, B, D, dtype=dtype, device=device)
    return x_LBD, *vectors(2, B, D, 2, dtype, device)


def _compiles() -> tuple[Compile, ...]:
    """Both passes at the widths of the presets, bf16, 1280 tokens of 16 samples (B) or 4 (XL)."""
    found = []
    for preset, norm in (("b", "layer"), ("xl", "rms")):
        step = shapes.step(preset, 512)
        L, B, D, size = step.tokens, step.samples, step.hidden_size, 2
        rms, numbers = norm == "rms", L * step.samples * D
        W, R, warps = tile(D, FORWARD_NUMBERS)
        vector, reads = size * B * D, triton.cdiv(L, R * TILES)
        found.append(
            Compile(
                name=f"modulate forward {norm} {D} bf16",
                kernel=_forward_kernel,
                signature=dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr", "y_ptr"), "*bf16")
                | dict.fromkeys(("tokens", "samples", "shift_stride", "scale_stride"), "i32")
                | {"eps": "fp32"},
                constexprs={"D": D, "W": W, "R": R, "TILES": TILES, "RMS": rms, "SHIFT": not rms},
                aligned=("x_ptr", "shift_ptr", "scale_ptr", "y_ptr", "shift_stride", "scale_stride"),
                num_warps=warps,
                min_occupancy=0.5,
                streaming=True,
                bytes_min=2 * size * numbers + (2 - rms) * vector,
                bytes_actual=2 * size * numbers + (2 - rms) * vector * reads,
            )
        )
        W, R, warps = tile(D, BACKWARD_NUMBERS)
        tiles = max(1, SPLIT_TOKENS // R)
        splits = triton.cdiv(L, R * tiles)
        found.append(
            Compile(
                name=f"modulate backward {norm} {D} bf16",
                kernel=_backward_kernel,
                signature=dict.fromkeys(("dy_ptr", "x_ptr", "scale_ptr", "dx_ptr"), "*bf16")
                | {"partial_ptr": "*fp32", "eps": "fp32"}
                | dict.fromkeys(("tokens", "samples", "scale_stride"), "i32"),
                constexprs={"D": D, "W": W, "R": R, "TILES": tiles, "RMS": rms},
                aligned=("dy_ptr", "x_ptr", "scale_ptr", "dx_ptr", "partial_ptr", "scale_stride"),
                num_warps=warps,
                min_occupancy=0.5,
                streaming=True,
                bytes_min=3 * size * numbers + 3 * vector,
                bytes_actual=3 * size * numbers + splits * (vector + 2 * 4 * B * D),
            )
        )
    return tuple(found)


OP = Op(
    name="modulate",
    fused=modulate,
    reference=reference,
    cases=(
        _case("one token", 1, 1, 8),
        _case("odd lengths", 5, 3, 24),
        _case("a width that is no power of two, far from zero", 3, 2, 40, far=100.0),
        _case("rms without shift", 9, 2, 32, "rms", shift=False),
        _case("rms with shift", 3, 1, 72, "rms"),
        _case("several splits", 131, 1, 8),
        _case("empty batch", 4, 0, 16),
        _case("no token", 0, 2, 16),
    ),
    differentiable=(0, 1, 2),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=_compiles(),
    bench=_bench,
)
