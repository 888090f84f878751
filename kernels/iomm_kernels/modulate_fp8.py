"""modulate_fp8: modulate, with its output quantised for the FP8 matrix product that follows.

    y = n(x) (1 + scale) + shift,   q = fp8(clamp(quant_scale y, +-largest)),   amax = max |y|

`quant_scale` is the caller's, from the amax of earlier steps (delayed scaling, arXiv 2209.05433); `amax` is
this step's, for the next. y itself is never stored.

Shapes: x, q (L, B, D), channels contiguous; shift, scale (B, D), rows of any stride; quant_scale and amax ().
Numerics: y, statistics and amax in fp32; a maximum has no order, so the bits repeat.
Bytes: reads x (2 a number in bf16), writes q (1).
No backward pass: where it is used, the product's backward pass ends in `modulate`'s. Asking for a gradient is
an error.

How it is tested: casts to FP8 are wrong in Triton's interpreter, so the cases use out_dtype fp32 (scaled and
clamped, not cast); PyTorch's cast is tested on CPU by provider "eager"; the kernel's cast is compiled ahead
of time for sm_90a and has not run yet.
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels import modulate as plain
from iomm_kernels import shapes
from iomm_kernels.launch import contiguous_rows, jit, resolve, tensor_bytes, tl, triton
from iomm_kernels.norm_rows import check_inputs, row_statistics, tile, vectors
from iomm_kernels.record import Case, Compile, Op, draw

TILES = 4  # tiles of a program, which share the sample's vectors
NUMBERS = 16  # of a tile a thread: 128 bits of FP8
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.float32: 448.0}


# --- reference ------------------------------------------------------------------------------------------


def reference(
    x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, quant_scale: Tensor, norm: str = "layer",
    eps: float = 1e-6, out_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, computed in fp32 or better. fp64 inputs with out_dtype fp32 give fp64."""
    dtype = torch.promote_types(x_LBD.dtype, torch.float32)
    y_LBD = plain.reference(x_LBD.to(dtype), shift_BD.to(dtype), scale_BD.to(dtype), norm, eps)
    amax = y_LBD.abs().amax() if y_LBD.numel() else y_LBD.new_zeros(())
    clamped = (y_LBD * quant_scale.to(dtype)).clamp(-LARGEST[out_dtype], LARGEST[out_dtype])
    return clamped.to(dtype if out_dtype == torch.float32 else out_dtype), amax


# --- forward --------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr, shift_ptr, scale_ptr, quant_scale_ptr, q_ptr, partial_ptr,
    tokens, samples, shift_stride, scale_stride, eps,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, RMS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, W)
    inside = cols < D
    scale = 1.0 + tl.load(scale_ptr + b * scale_stride + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride + cols, mask=inside, other=0.0).to(tl.float32)
    quant_scale = tl.load(quant_scale_ptr)
    amax = 0.0
    for i in range(TILES):
        l_R1 = ((tl.program_id(0) * TILES + i) * R + tl.arange(0, R))[:, None]
        there_RW = (l_R1 < tokens) & inside[None, :]
        offset_RW = (l_R1.to(tl.int64) * samples + b) * D + cols[None, :]
        x_RW = tl.load(x_ptr + offset_RW, mask=there_RW, other=0.0).to(tl.float32)
        n_RW, _ = row_statistics(x_RW, inside, D, eps, RMS)
        y_RW = tl.where(there_RW, n_RW * scale[None, :] + shift[None, :], 0.0)
        amax = tl.maximum(amax, tl.max(tl.abs(y_RW)))
        q_RW = tl.minimum(tl.maximum(y_RW * quant_scale, -LARGEST), LARGEST)
        tl.store(q_ptr + offset_RW, q_RW.to(q_ptr.dtype.element_ty), mask=there_RW)
    tl.store(partial_ptr + tl.program_id(0) * samples + b, amax)


def _forward_triton(
    x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, quant_scale: Tensor, norm: str, eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_LBD, shift_BD, scale_BD = x_LBD.contiguous(), contiguous_rows(shift_BD), contiguous_rows(scale_BD)
    (L, B, D), q_LBD = x_LBD.shape, torch.empty_like(x_LBD, dtype=out_dtype)
    if not q_LBD.numel():
        return q_LBD, torch.zeros((), dtype=torch.float32, device=x_LBD.device)
    W, R, warps = tile(D, NUMBERS)
    grid = (triton.cdiv(L, R * TILES), B)
    partial = torch.empty(grid, dtype=torch.float32, device=x_LBD.device)
    _forward_kernel[grid](
        x_LBD, shift_BD, scale_BD, quant_scale.float(), q_LBD, partial, L, B, shift_BD.stride(0),
        scale_BD.stride(0), eps, D=D, W=W, R=R, TILES=TILES, RMS=norm == "rms", LARGEST=LARGEST[out_dtype],
        num_warps=warps,
    )  # fmt: skip
    return q_LBD, partial.amax()


# --- torch.library --------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::modulate_fp8", mutates_args=())
def _modulate_fp8(
    x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, quant_scale: Tensor, norm: str, eps: float,
    out_dtype: torch.dtype, provider: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = (x_LBD, shift_BD, scale_BD, quant_scale, norm, eps, out_dtype)
    if resolve("modulate_fp8", provider, x_LBD.device.type, x_LBD.dtype) == "triton":
        return _forward_triton(*inputs)
    q_LBD, amax = reference(*inputs)
    return q_LBD.contiguous(), amax


@_modulate_fp8.register_fake
def _(x_LBD, shift_BD, scale_BD, quant_scale, norm, eps, out_dtype, provider):
    return x_LBD.new_empty(x_LBD.shape, dtype=out_dtype), x_LBD.new_empty((), dtype=torch.float32)


# --- public function ------------------------------------------------------------------------------------


def modulate_fp8(
    x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, quant_scale: Tensor, norm: str = "layer",
    eps: float = 1e-6, out_dtype: torch.dtype = torch.float8_e4m3fn, *, provider: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q, amax): q like x in `out_dtype`, amax fp32.

    Args:
        quant_scale: fp32, one number; q / quant_scale is about y.
        out_dtype: float8_e4m3fn, float8_e5m2, or float32 for the numbers before the cast.
    Raises:
        ValueError: shapes or dtypes do not fit, an input asks for a gradient, or the provider cannot serve.
    """
    check_inputs("modulate_fp8", x_LBD, norm, shift=shift_BD, scale=scale_BD)
    if out_dtype not in LARGEST:
        raise ValueError(f"modulate_fp8: out_dtype {out_dtype} is none of {', '.join(map(str, LARGEST))}.")
    if quant_scale.numel() != 1:
        raise ValueError(f"modulate_fp8: quant_scale has {quant_scale.numel()} numbers; give one.")
    inputs = (x_LBD, shift_BD, scale_BD, quant_scale, norm, eps, out_dtype)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise ValueError("modulate_fp8 has no backward pass, but an input asks for a gradient. Use modulate.")
    chosen = resolve("modulate_fp8", provider, x_LBD.device.type, x_LBD.dtype)
    return reference(*inputs) if chosen == "eager" else _modulate_fp8(*inputs, chosen)


# --- record ---------------------------------------------------------------------------------------------


def _case(name: str, L: int, B: int, D: int, norm: str = "layer", quant_scale: float = 32.0) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x_LBD = draw(1, L, B, D, dtype=dtype, device=device)
        quant = torch.tensor(quant_scale, device=device)
        return x_LBD, *vectors(2, B, D, 2, dtype, device), quant, norm, 1e-6, torch.float32

    return Case(name=name, make=make)


def _bytes_moved(x_LBD: Tensor, *others: Any) -> int:
    size = others[5].itemsize if len(others) > 5 else 1
    return tensor_bytes(x_LBD, *others) + x_LBD.numel() * size + 4


def _bytes_issued(x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *others: Any) -> int:
    programs = triton.cdiv(x_LBD.shape[0], tile(x_LBD.shape[-1], NUMBERS)[1] * TILES)
    again = (programs - 1) * tensor_bytes(shift_BD, scale_BD) if programs else 0
    return _bytes_moved(x_LBD, shift_BD, scale_BD, *others) + again + 8 * programs * x_LBD.shape[1]


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    x_LBD, shift_BD, scale_BD = plain.OP.bench(preset, side_px, dtype, device)
    return x_LBD, shift_BD, scale_BD, torch.tensor(32.0, device=device)


def _compile(preset: str, norm: str) -> Compile:
    """At 512 px, bf16 to float8_e4m3fn."""
    step = shapes.step(preset, 512)
    L, B, D = step.tokens, step.samples, step.hidden_size
    W, R, warps = tile(D, NUMBERS)
    programs = triton.cdiv(L, R * TILES)
    tensors = ("x_ptr", "shift_ptr", "scale_ptr")
    return Compile(
        name=f"modulate_fp8 {norm} {D} bf16",
        kernel=_forward_kernel,
        signature=dict.fromkeys(tensors, "*bf16")
        | {"quant_scale_ptr": "*fp32", "q_ptr": "*fp8e4nv", "partial_ptr": "*fp32", "eps": "fp32"}
        | dict.fromkeys(("tokens", "samples", "shift_stride", "scale_stride"), "i32"),
        constexprs={
            "D": D, "W": W, "R": R, "TILES": TILES, "RMS": norm == "rms",
            "LARGEST": LARGEST[torch.float8_e4m3fn],
        },
        aligned=(*tensors, "quant_scale_ptr", "q_ptr", "partial_ptr", "shift_stride", "scale_stride"),
        num_warps=warps,
        min_occupancy=0.375,
        streaming=True,
        scalars=2,  # quant_scale, and a program's partial amax
        bytes_min=3 * L * B * D + 2 * 2 * B * D + 8,
        bytes_actual=3 * L * B * D + programs * (2 * 2 * B * D + 8 * B),
    )  # fmt: skip


OP = Op(
    name="modulate_fp8",
    fused=modulate_fp8,
    reference=reference,
    cases=(
        _case("one token", 1, 1, 8),
        _case("odd lengths", 5, 3, 24),
        _case("a width that is no power of two, rms", 3, 2, 40, "rms"),
        _case("numbers beyond the largest", 3, 1, 16, quant_scale=400.0),
        _case("several programs", 131, 1, 8),
        _case("empty batch", 4, 0, 16),
    ),
    differentiable=(),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=(_compile("b", "layer"), _compile("xl", "rms")),
    bench=_bench,
)
