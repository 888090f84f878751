"""velocity_mse: the training loss of each sample and its gradient in one pass.

    loss_b = mean over the sample's n numbers of (v - u)^2          u: the target velocity
    backward: dv = (2 / n) dloss_b (v - u)

Shapes: v, u (B, L, C), any number of axes; loss (B,) fp32.
Numerics: differences, squares and sums in fp32. Partial sums of a fixed split, added in a fixed order: the
same bits every time. The forward pass keeps v - u, rounded to v's dtype, in place of v and u; without the
factor 2 / n, which is too small for fp16.
Bytes: forward reads v and u and writes v - u; backward reads v - u and writes dv. The target gets no
gradient.
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels import shapes
from iomm_kernels.launch import jit, next_power_of_2, resolve, tensor_bytes, tl, triton
from iomm_kernels.record import Case, Compile, Op, draw

NUMBERS, WARPS = 2048, 4  # of a sample a program: 16 a thread


# --- reference ------------------------------------------------------------------------------------------


def reference(velocity_BLC: Tensor, target_BLC: Tensor) -> Tensor:
    """Plain PyTorch in fp32 or better, differentiable."""
    dtype = torch.promote_types(velocity_BLC.dtype, torch.float32)
    return (velocity_BLC.to(dtype) - target_BLC.to(dtype)).square().flatten(1).mean(1)


# --- forward --------------------------------------------------------------------------------------------


@jit
def _forward_kernel(v_ptr, u_ptr, difference_ptr, partial_ptr, elements, N: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.load(v_ptr + b * elements + at, mask=at < elements, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + b * elements + at, mask=at < elements, other=0.0).to(tl.float32)
    difference = v - u
    rounded = difference.to(difference_ptr.dtype.element_ty)
    tl.store(difference_ptr + b * elements + at, rounded, mask=at < elements)
    tl.store(partial_ptr + b * tl.num_programs(0) + tl.program_id(0), tl.sum(difference * difference))


def _split(x: Tensor) -> tuple[int, int, tuple[int, int]]:
    """Numbers of a sample, of a program, and the grid (programs a sample, samples)."""
    elements = x[0].numel()
    N = min(NUMBERS, next_power_of_2(elements))
    return elements, N, (triton.cdiv(elements, N), x.shape[0])


def _forward_triton(velocity_BLC: Tensor, target_BLC: Tensor) -> tuple[Tensor, Tensor]:
    v, u = velocity_BLC.contiguous(), target_BLC.contiguous()
    difference = torch.empty_like(v)
    if not v.numel():
        # The mean of no number is not a number, as in the reference.
        return torch.full((len(v),), torch.nan, dtype=torch.float32, device=v.device), difference
    elements, N, grid = _split(v)
    partial = torch.empty(grid[1], grid[0], dtype=torch.float32, device=v.device)
    _forward_kernel[grid](v, u, difference, partial, elements, N=N, num_warps=WARPS)
    return partial.sum(1) / elements, difference


# --- backward -------------------------------------------------------------------------------------------


@jit
def _backward_kernel(difference_ptr, factor_ptr, dv_ptr, elements, N: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * N + tl.arange(0, N)
    difference = tl.load(difference_ptr + b * elements + at, mask=at < elements, other=0.0).to(tl.float32)
    dv = tl.load(factor_ptr + b) * difference
    tl.store(dv_ptr + b * elements + at, dv.to(dv_ptr.dtype.element_ty), mask=at < elements)


def _backward_triton(difference_BLC: Tensor, factor_B: Tensor) -> Tensor:
    difference_BLC, dv_BLC = difference_BLC.contiguous(), torch.empty_like(difference_BLC)
    if dv_BLC.numel():
        elements, N, grid = _split(dv_BLC)
        _backward_kernel[grid](
            difference_BLC, factor_B.float().contiguous(), dv_BLC, elements, N=N, num_warps=WARPS
        )
    return dv_BLC


# --- autograd -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::velocity_mse", mutates_args=())
def _velocity_mse(velocity_BLC: Tensor, target_BLC: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    """loss_B and v - u."""
    chosen = resolve("velocity_mse", provider, velocity_BLC.device.type, velocity_BLC.dtype)
    if chosen == "triton":
        return _forward_triton(velocity_BLC, target_BLC)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.velocity_mse(velocity_BLC, target_BLC)
    difference = (velocity_BLC - target_BLC).to(velocity_BLC.dtype).contiguous()
    return reference(velocity_BLC, target_BLC), difference


@_velocity_mse.register_fake
def _(velocity_BLC: Tensor, target_BLC: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(velocity_BLC.dtype, torch.float32)
    loss_B = velocity_BLC.new_empty(velocity_BLC.shape[:1], dtype=dtype)
    return loss_B, velocity_BLC.new_empty(velocity_BLC.shape)


@torch.library.custom_op("iomm_kernels::velocity_mse_backward", mutates_args=())
def _velocity_mse_backward(difference_BLC: Tensor, factor_B: Tensor, provider: str) -> Tensor:
    """factor_b (v - u)."""
    if provider == "csrc":  # has none: a product is as fast in plain PyTorch
        provider = "eager"
    chosen = resolve("velocity_mse_backward", provider, difference_BLC.device.type, difference_BLC.dtype)
    if chosen == "triton":
        return _backward_triton(difference_BLC, factor_B)
    factor = factor_B.view(-1, *(1,) * (difference_BLC.ndim - 1))
    return (factor * difference_BLC).to(difference_BLC.dtype).contiguous()


@_velocity_mse_backward.register_fake
def _(difference_BLC: Tensor, factor_B: Tensor, provider: str) -> Tensor:
    return difference_BLC.new_empty(difference_BLC.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.provider = inputs[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dloss_B: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (difference_BLC,) = ctx.saved_tensors
    elements = max(1, difference_BLC[:1].numel())
    return _velocity_mse_backward(difference_BLC, dloss_B * (2 / elements), ctx.provider), None, None


_velocity_mse.register_autograd(_differentiate, setup_context=_setup)


# --- public function ------------------------------------------------------------------------------------


def velocity_mse(velocity_BLC: Tensor, target_BLC: Tensor, *, provider: str = "auto") -> Tensor:
    """loss_B, each sample's mean squared error in fp32; differentiable in the velocity.

    Raises:
        ValueError: shapes or dtypes differ, the target asks for a gradient, or the provider cannot serve
            here.
    """
    if velocity_BLC.shape != target_BLC.shape or velocity_BLC.dtype != target_BLC.dtype:
        raise ValueError(
            f"velocity_mse: velocity is {velocity_BLC.dtype} {tuple(velocity_BLC.shape)} and target "
            f"{target_BLC.dtype} {tuple(target_BLC.shape)}; they have to be alike."
        )
    if torch.is_grad_enabled() and target_BLC.requires_grad:
        raise ValueError("velocity_mse gives the target no gradient, but it asks for one. Detach it.")
    chosen = resolve("velocity_mse", provider, velocity_BLC.device.type, velocity_BLC.dtype)
    if chosen == "eager":
        return reference(velocity_BLC, target_BLC)
    return _velocity_mse(velocity_BLC, target_BLC, chosen)[0]


# --- record ---------------------------------------------------------------------------------------------


def _case(name: str, shape: tuple[int, int, int], far: float = 0) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        B, L, C = shape
        v_BLC, u_BLC = (draw(seed, L, B, C, dtype=dtype, device=device).transpose(0, 1) for seed in (1, 2))
        return v_BLC + far, u_BLC + far

    return Case(name=name, make=make)


def _bytes_moved(velocity_BLC: Tensor, target_BLC: Tensor) -> int:
    return tensor_bytes(velocity_BLC, target_BLC, velocity_BLC) + 4 * len(velocity_BLC)


def _bytes_issued(velocity_BLC: Tensor, target_BLC: Tensor) -> int:
    programs = triton.cdiv(velocity_BLC[:1].numel(), NUMBERS)
    return tensor_bytes(velocity_BLC, target_BLC, velocity_BLC) + 4 * len(velocity_BLC) * programs


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    step = shapes.step(preset, side_px)
    shape = (step.samples, step.latent_tokens, step.latent_channels)
    return tuple(draw(seed, *shape, dtype=dtype, device=device) for seed in (1, 2))


def _compile(kernel: Any, tensors: tuple[str, ...], number: str) -> Compile:
    """At 16 samples of 4096 tokens, bf16: preset B at 1024 px."""
    step = shapes.step("b", 1024)
    elements = step.latent_tokens * step.latent_channels
    moved, programs = (
        len(tensors) * 2 * elements * step.samples,
        triton.cdiv(elements, NUMBERS) * step.samples,
    )
    return Compile(
        name=f"velocity_mse {'forward' if len(tensors) == 3 else 'backward'} bf16",
        kernel=kernel,
        signature=dict.fromkeys(tensors, "*bf16") | {number: "*fp32", "elements": "i32"},
        constexprs={"N": NUMBERS},
        aligned=(*tensors, number, "elements"),
        num_warps=WARPS,
        min_occupancy=0.5,
        streaming=True,
        scalars=1,  # a program's partial sum, or its sample's factor
        bytes_min=moved + 4 * step.samples,
        bytes_actual=moved + 4 * programs,
    )


OP = Op(
    name="velocity_mse",
    fused=velocity_mse,
    reference=reference,
    cases=(
        _case("one element", (1, 1, 1)),
        _case("odd lengths", (3, 5, 7)),
        _case("several programs a sample", (2, 65, 40)),
        _case("far from zero", (2, 4, 16), far=100.0),
        _case("empty batch", (0, 4, 16)),
    ),
    differentiable=(0,),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=(
        _compile(_forward_kernel, ("v_ptr", "u_ptr", "difference_ptr"), "partial_ptr"),
        _compile(_backward_kernel, ("difference_ptr", "dv_ptr"), "factor_ptr"),
    ),
    bench=_bench,
)
