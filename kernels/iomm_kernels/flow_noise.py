"""flow_noise: noisy latents and the velocity target in one pass; the noise is drawn, used and never stored.

    z = N(0, 1) by Philox(seed, stream, sample index, element) and Box-Muller
    x_t = (1 - t) x + t z,   target = z - x                    (method: the straight path, paper section 3)

Shapes: x, x_t, target (B, L, C); t (B,) fp32; index (B,) int64, global sample indices. In the kernel a
program takes 4 N elements of a sample: a Philox block gives four.
Numerics: the bits of the words equal `iomm_kernels.philox`; normal numbers agree to ulps of log, cos and sin.
fp32, one rounding.
Bytes: reads x; writes x_t and target.
No backward pass: x is data and t is drawn. Asking for a gradient of x is an error.
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels import shapes
from iomm_kernels.launch import jit, next_power_of_2, resolve, tensor_bytes, tl, triton
from iomm_kernels.philox import normal, normal_pair, philox_block, signed_seed
from iomm_kernels.record import Case, Compile, Op, draw

NOISE_STREAM = 1
BLOCKS, WARPS = 256, 4  # Philox blocks a program: two a thread, 8 elements


# --- reference ------------------------------------------------------------------------------------------


def reference(
    x_BLC: Tensor, t_B: Tensor, index_B: Tensor, seed: int, stream: int = NOISE_STREAM
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, computed in fp32 or better."""
    dtype = torch.promote_types(x_BLC.dtype, torch.float32)
    x, t = x_BLC.to(dtype), t_B.to(dtype).view(-1, *(1,) * (x_BLC.ndim - 1))
    z = normal(seed, stream, index_B, x_BLC[:1].numel(), dtype).view(x_BLC.shape)
    return ((1 - t) * x + t * z).to(x_BLC.dtype), (z - x).to(x_BLC.dtype)


# --- forward --------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr, t_ptr, index_ptr, x_t_ptr, target_ptr,
    seed, elements,
    STREAM: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    block_N = tl.program_id(0) * N + tl.arange(0, N)
    index_N = tl.load(index_ptr + b) + tl.zeros((N,), tl.int64)
    w0, w1, w2, w3 = philox_block(seed, STREAM, index_N, block_N)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * N,))
    element = tl.program_id(0) * (4 * N) + tl.arange(0, 4 * N)
    there = element < elements
    offset = b * elements + element
    t = tl.load(t_ptr + b)
    x = tl.load(x_ptr + offset, mask=there, other=0.0).to(tl.float32)
    tl.store(x_t_ptr + offset, ((1.0 - t) * x + t * z).to(x_t_ptr.dtype.element_ty), mask=there)
    tl.store(target_ptr + offset, (z - x).to(target_ptr.dtype.element_ty), mask=there)


def _forward_triton(
    x_BLC: Tensor, t_B: Tensor, index_B: Tensor, seed: int, stream: int
) -> tuple[Tensor, Tensor]:
    x_BLC, t_B, index_B = x_BLC.contiguous(), t_B.float().contiguous(), index_B.to(torch.int64).contiguous()
    x_t_BLC, target_BLC = torch.empty_like(x_BLC), torch.empty_like(x_BLC)
    if x_BLC.numel():
        elements = x_BLC[0].numel()
        N = min(BLOCKS, next_power_of_2(triton.cdiv(elements, 4)))
        _forward_kernel[(triton.cdiv(elements, 4 * N), len(x_BLC))](
            x_BLC, t_B, index_B, x_t_BLC, target_BLC, seed, elements, STREAM=stream, N=N, num_warps=WARPS
        )  # fmt: skip
    return x_t_BLC, target_BLC


# --- torch.library --------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::flow_noise", mutates_args=())
def _flow_noise(
    x_BLC: Tensor, t_B: Tensor, index_B: Tensor, seed: int, stream: int, provider: str
) -> tuple[Tensor, Tensor]:
    chosen = resolve("flow_noise", provider, x_BLC.device.type, x_BLC.dtype)
    if chosen == "triton":
        return _forward_triton(x_BLC, t_B, index_B, seed, stream)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.flow_noise(x_BLC, t_B, index_B, seed, stream)
    x_t, target = reference(x_BLC, t_B, index_B, seed, stream)
    return x_t.contiguous(), target.contiguous()


@_flow_noise.register_fake
def _(
    x_BLC: Tensor, t_B: Tensor, index_B: Tensor, seed: int, stream: int, provider: str
) -> tuple[Tensor, Tensor]:
    return x_BLC.new_empty(x_BLC.shape), x_BLC.new_empty(x_BLC.shape)


# --- public function ------------------------------------------------------------------------------------


def flow_noise(
    x_BLC: Tensor, t_B: Tensor, index_B: Tensor, seed: int, stream: int = NOISE_STREAM, *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_t and the target z - x, both like x.

    Args:
        x_BLC: clean latents, (B, ...).
        t_B: timesteps in [0, 1], 1 = noise.
        index_B: global sample indices.
        stream: number of the random stream; the training noise is 1.
    Raises:
        ValueError: shapes do not fit, x asks for a gradient, or the provider cannot serve here.
    """
    B = x_BLC.shape[0]
    if t_B.shape != (B,) or index_B.shape != (B,):
        raise ValueError(
            f"flow_noise: t {tuple(t_B.shape)} and index {tuple(index_B.shape)} have to be ({B},), one of "
            f"each for the samples of x {tuple(x_BLC.shape)}."
        )
    if torch.is_grad_enabled() and (x_BLC.requires_grad or t_B.requires_grad):
        raise ValueError("flow_noise has no backward pass, but x or t asks for a gradient. Detach it.")
    chosen = resolve("flow_noise", provider, x_BLC.device.type, x_BLC.dtype)
    if chosen == "eager":
        return reference(x_BLC, t_B, index_B, seed, stream)
    return _flow_noise(x_BLC, t_B, index_B, signed_seed(seed), stream, chosen)


# --- record ---------------------------------------------------------------------------------------------


def _case(name: str, shape: tuple[int, ...], seed: int = 5, first: int = 0) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x_BLC = draw(1, *shape[::-1], dtype=dtype, device=device).permute(*reversed(range(len(shape))))
        t_B = torch.linspace(0, 1, shape[0], device=device)
        return x_BLC, t_B, torch.arange(shape[0], device=device) * 3 + first, seed

    return Case(name=name, make=make)


def _bytes_moved(x_BLC: Tensor, t_B: Tensor, index_B: Tensor, *_: Any) -> int:
    return tensor_bytes(x_BLC, x_BLC, x_BLC, t_B, index_B)


def _bytes_issued(x_BLC: Tensor, t_B: Tensor, index_B: Tensor, *_: Any) -> int:
    programs = triton.cdiv(x_BLC[:1].numel(), 4 * BLOCKS)
    return tensor_bytes(x_BLC, x_BLC, x_BLC) + programs * 12 * len(x_BLC)


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    step = shapes.step(preset, side_px)
    x_BLC = draw(1, step.samples, step.latent_tokens, step.latent_channels, dtype=dtype, device=device)
    return x_BLC, torch.rand(step.samples, device=device), torch.arange(step.samples, device=device), 0


def _compile(dtype: str, size: int) -> Compile:
    """At 16 samples of 4096 tokens: preset B at 1024 px."""
    step = shapes.step("b", 1024)
    elements = step.latent_tokens * step.latent_channels
    moved, programs = 3 * size * elements * step.samples, triton.cdiv(elements, 4 * BLOCKS) * step.samples
    tensors = ("x_ptr", "x_t_ptr", "target_ptr")
    return Compile(
        name=f"flow_noise {dtype}",
        kernel=_forward_kernel,
        signature=dict.fromkeys(tensors, f"*{dtype}")
        | {"t_ptr": "*fp32", "index_ptr": "*i64", "seed": "i64", "elements": "i32"},
        constexprs={"STREAM": NOISE_STREAM, "N": BLOCKS},
        aligned=(*tensors, "t_ptr", "index_ptr", "elements"),
        num_warps=WARPS,
        min_occupancy=0.5,
        streaming=True,
        scalars=2,  # t and index of the sample
        bytes_min=moved + 12 * step.samples,
        bytes_actual=moved + 12 * programs,
    )


OP = Op(
    name="flow_noise",
    fused=flow_noise,
    reference=reference,
    cases=(
        _case("one element", (1, 1, 1)),
        _case("odd lengths, a sample index beyond 32 bits", (3, 5, 7), first=1 << 33),
        _case("a seed beyond 32 bits", (2, 4, 8), seed=(1 << 63) + 12345),
        _case("two programs a sample", (1, 33, 40)),
        _case("four axes", (2, 3, 2, 2)),
        _case("empty batch", (0, 4, 16)),
        _case("no token", (2, 0, 16)),
    ),
    differentiable=(),
    bytes_moved=_bytes_moved,
    bytes_issued=_bytes_issued,
    compiles=(_compile("bf16", 2), _compile("fp32", 4)),
    bench=_bench,
)
