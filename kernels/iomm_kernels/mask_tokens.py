"""mask_tokens: zero the masked patch tokens of an image, drawing the mask in the same pass.

    keep[b, n] = uniform(seed, MASK stream, index[b], n) >= mask_ratio   and not hidden[b]
    y[b, n]    = x[b, n] if keep[b, n] else 0
    dx[b, n]   = dy[b, n] if keep[b, n] else 0

(METHOD.md section 2: each patch token of a frozen ViT is kept with probability 1 - r.) The decision is a
function of (seed, global sample index, token) alone and is drawn again in the backward pass, so no mask is
stored. The bits are `philox.uniform`'s. `hidden_B` masks whole samples: the null condition.

Shapes: x_BNF of any floating dtype, index_B int64, hidden_B bool or None. B samples, N patch tokens, F
numbers of a token.
Numerics: a copy or a zero; exact in every dtype. A masked token that holds inf or nan becomes 0.
Bytes: reads the kept tokens only, writes every token: (2 - r) B N F at best, 2.5 B N F for x * keep with a
stored mask.

Not yet run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from iomm_kernels.launch import jit, resolve, tensor_bytes, tl, triton
from iomm_kernels.philox import philox_element, signed_seed, threshold, uniform
from iomm_kernels.record import Case, Compile, Op

MASK_STREAM = 3  # iomm.random.Stream.MASK


# reference


def keep_reference(
    index_B: Tensor, tokens: int, seed: int, mask_ratio: float, hidden_B: Tensor | None = None
) -> Tensor:
    """keep_BN bool: True where a token is kept."""
    keep_BN = uniform(seed, MASK_STREAM, index_B, tokens) >= mask_ratio
    return keep_BN if hidden_B is None else keep_BN & ~hidden_B[:, None]


def reference(
    x_BNF: Tensor, index_B: Tensor, seed: int, mask_ratio: float, hidden_B: Tensor | None = None
) -> Tensor:
    """Plain PyTorch, any floating dtype, differentiable."""
    keep_BN = keep_reference(index_B, x_BNF.shape[1], seed, mask_ratio, hidden_B)
    return x_BNF.masked_fill(~keep_BN[..., None], 0)


# forward; the backward pass is the same kernel on the gradient


@jit
def _drawn(index, hidden, seed, level, row, rows, tokens, HIDDEN: tl.constexpr, STREAM: tl.constexpr):
    """keep of the flat tokens `row`; False behind the last one."""
    inside = row < rows
    sample = row // tokens
    word = philox_element(
        seed, STREAM, tl.load(index + sample, mask=inside, other=0), (row % tokens).to(tl.int32)
    )
    keep = ((word >> 9).to(tl.int32) >= level) & inside
    if HIDDEN:
        keep = keep & (tl.load(hidden + sample, mask=inside, other=1) == 0)
    return keep


@jit
def mask_kernel(
    x,
    y,
    index,
    hidden,
    seed,
    level,
    rows,
    tokens,
    width,
    HIDDEN: tl.constexpr,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program masks ROWS tokens, COLS numbers at a time: one draw a token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = _drawn(index, hidden, seed, level, row, rows, tokens, HIDDEN, STREAM)
    inside = row < rows
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        at = row[:, None] * width + col[None, :]
        kept = tl.load(x + at, mask=keep[:, None] & (col < width)[None, :], other=0.0)
        tl.store(y + at, kept, mask=inside[:, None] & (col < width)[None, :])


@jit
def keep_kernel(
    keep,
    index,
    hidden,
    seed,
    level,
    rows,
    tokens,
    HIDDEN: tl.constexpr,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program decides ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = _drawn(index, hidden, seed, level, row, rows, tokens, HIDDEN, STREAM)
    tl.store(keep + row, kept.to(tl.int8), mask=row < rows)


ROWS, COLS, WARPS = 4, 512, 4
KEEP_ROWS = 256


def _columns(width: int) -> int:
    return min(COLS, triton.next_power_of_2(width))


def _launch_mask(
    x_BNF: Tensor, index_B: Tensor, hidden_B: Tensor | None, seed: int, mask_ratio: float
) -> Tensor:
    x_BNF, y_BNF = x_BNF.contiguous(), torch.empty_like(x_BNF, memory_format=torch.contiguous_format)
    if not x_BNF.numel():
        return y_BNF
    rows, tokens, width = x_BNF.shape[0] * x_BNF.shape[1], x_BNF.shape[1], x_BNF.shape[2]
    mask_kernel[(triton.cdiv(rows, ROWS),)](
        x_BNF, y_BNF, *_draw_arguments(index_B, hidden_B), signed_seed(seed), threshold(mask_ratio),
        rows, tokens, width, HIDDEN=hidden_B is not None, STREAM=MASK_STREAM, ROWS=ROWS,
        COLS=_columns(width), num_warps=WARPS,
    )  # fmt: skip
    return y_BNF


def _draw_arguments(index_B: Tensor, hidden_B: Tensor | None) -> tuple[Tensor, Tensor]:
    index_B = index_B.to(torch.int64).contiguous()
    return index_B, index_B if hidden_B is None else hidden_B.contiguous().view(torch.int8)


# autograd


@torch.library.custom_op("iomm_kernels::mask_tokens", mutates_args=())
def _mask_op(
    x_BNF: Tensor, index_B: Tensor, hidden_B: Tensor | None, seed: int, mask_ratio: float, provider: str
) -> Tensor:
    chosen = resolve("mask_tokens", provider, x_BNF.device.type)
    if chosen == "triton":
        return _launch_mask(x_BNF, index_B, hidden_B, seed, mask_ratio)
    if chosen == "csrc":
        draw = seed, MASK_STREAM, threshold(mask_ratio)
        return torch.ops.iomm_csrc.mask_tokens(x_BNF, index_B.to(torch.int64), hidden_B, *draw)
    return reference(x_BNF.contiguous(), index_B, seed, mask_ratio, hidden_B)


@_mask_op.register_fake
def _(x_BNF, index_B, hidden_B, seed, mask_ratio, provider):
    return torch.empty_like(x_BNF, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index_B, hidden_B, ctx.seed, ctx.mask_ratio, ctx.provider = inputs
    ctx.save_for_backward(index_B, hidden_B)


def _backward(ctx: Any, dy_BNF: Tensor) -> tuple[Any, ...]:
    index_B, hidden_B = ctx.saved_tensors
    dx_BNF = _mask_op(dy_BNF, index_B, hidden_B, ctx.seed, ctx.mask_ratio, ctx.provider)
    return dx_BNF, None, None, None, None, None


_mask_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("iomm_kernels::keep_tokens", mutates_args=())
def _keep_op(
    index_B: Tensor, hidden_B: Tensor | None, tokens: int, seed: int, mask_ratio: float, provider: str
) -> Tensor:
    chosen = resolve("keep_tokens", provider, index_B.device.type)
    if chosen == "csrc":
        draw = seed, MASK_STREAM, threshold(mask_ratio)
        return torch.ops.iomm_csrc.keep_tokens(index_B.to(torch.int64), hidden_B, tokens, *draw)
    if chosen == "eager":
        return keep_reference(index_B, tokens, seed, mask_ratio, hidden_B)
    keep_BN = torch.empty(len(index_B), tokens, dtype=torch.bool, device=index_B.device)
    if keep_BN.numel():
        keep_kernel[(triton.cdiv(keep_BN.numel(), KEEP_ROWS),)](
            keep_BN.view(torch.int8), *_draw_arguments(index_B, hidden_B), signed_seed(seed),
            threshold(mask_ratio), keep_BN.numel(), tokens, HIDDEN=hidden_B is not None, STREAM=MASK_STREAM,
            ROWS=KEEP_ROWS,
        )  # fmt: skip
    return keep_BN


@_keep_op.register_fake
def _(index_B, hidden_B, tokens, seed, mask_ratio, provider):
    return index_B.new_empty((index_B.shape[0], tokens), dtype=torch.bool)


# public functions


def mask_tokens(
    x_BNF: Tensor,
    index_B: Tensor,
    seed: int,
    mask_ratio: float,
    hidden_B: Tensor | None = None,
    provider: str = "auto",
) -> Tensor:
    """Patch tokens with the masked ones set to zero, (B, N, F), contiguous; differentiable in x_BNF.

    Args:
        index_B: global sample indices, int64, on x's device.
        seed: of the run.
        mask_ratio: probability that a token is masked, in [0, 1].
        hidden_B: bool, True where every token of the sample is masked (null condition); None: nowhere.
        provider: see `launch`.
    Raises:
        ValueError: shapes that do not fit, a ratio outside [0, 1], a provider that cannot serve.
    """
    if x_BNF.ndim != 3 or index_B.shape != x_BNF.shape[:1]:
        raise ValueError(
            f"mask_tokens: x has shape {tuple(x_BNF.shape)} and index {tuple(index_B.shape)}; give x (B, N, "
            f"F) and index (B,)."
        )
    _check_draw(index_B, mask_ratio, hidden_B)
    chosen = resolve("mask_tokens", provider, x_BNF.device.type)
    return _mask_op(x_BNF, index_B, hidden_B, signed_seed(seed), float(mask_ratio), chosen)


def keep_tokens(
    index_B: Tensor,
    tokens: int,
    seed: int,
    mask_ratio: float,
    hidden_B: Tensor | None = None,
    provider: str = "auto",
) -> Tensor:
    """keep_BN bool: the decision that `mask_tokens` applies, for mask modes that hide or drop. Arguments and
    errors as there."""
    _check_draw(index_B, mask_ratio, hidden_B)
    chosen = resolve("keep_tokens", provider, index_B.device.type)
    return _keep_op(index_B, hidden_B, tokens, signed_seed(seed), float(mask_ratio), chosen)


def _check_draw(index_B: Tensor, mask_ratio: float, hidden_B: Tensor | None) -> None:
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"mask ratio {mask_ratio} is outside [0, 1]. It is the share of masked tokens.")
    if hidden_B is not None and (hidden_B.shape != index_B.shape or hidden_B.dtype != torch.bool):
        raise ValueError(
            f"hidden_B is {hidden_B.dtype} {tuple(hidden_B.shape)}; give bool {tuple(index_B.shape)}, one "
            f"for each sample index."
        )


# record


def _case(
    name: str, shape: tuple[int, int, int], ratio: float, hidden: bool = False, seed: int = (1 << 40) + 7
) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x_BNF = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        index_B = torch.arange(shape[0], device=device) * 3 + (1 << 33)
        hidden_B = torch.arange(shape[0], device=device) % 2 == 1 if hidden else None
        return x_BNF, index_B, seed, ratio, hidden_B

    return Case(name=name, make=make)


def _strided(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    x_NBF = torch.randn(5, 3, 48, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return x_NBF.transpose(0, 1)[..., ::2], torch.tensor([5, 1, 9], device=device), 1, 0.5, None


def _masked_bytes(
    x_BNF: Tensor, index_B: Tensor, seed: int, mask_ratio: float, hidden_B: Tensor | None = None
) -> int:
    kept = int(keep_reference(index_B, x_BNF.shape[1], seed, mask_ratio, hidden_B).sum())
    return kept * x_BNF.shape[-1] * x_BNF.element_size() + tensor_bytes(x_BNF, index_B, hidden_B)


def _issued_bytes(
    x_BNF: Tensor, index_B: Tensor, seed: int, mask_ratio: float, hidden_B: Tensor | None = None
) -> int:
    draws = x_BNF.shape[0] * x_BNF.shape[1] * (8 + (hidden_B is not None))  # each token reads its sample's
    return _masked_bytes(x_BNF, index_B, seed, mask_ratio, hidden_B) + draws


def _compile(dtype: str, width: int) -> Compile:
    batch, tokens, ratio, size = 64, 256, 0.85, {"bf16": 2, "fp32": 4}[dtype]
    moved = round((2 - ratio) * batch * tokens * width * size)
    return Compile(
        name=f"mask_tokens {width} {dtype}",
        kernel=mask_kernel,
        signature={
            "x": f"*{dtype}", "y": f"*{dtype}", "index": "*i64", "hidden": "*i8", "seed": "i64",
            "level": "i32", "rows": "i32", "tokens": "i32", "width": "i32",
        },
        constexprs={"HIDDEN": True, "STREAM": MASK_STREAM, "ROWS": ROWS, "COLS": _columns(width)},
        aligned=("x", "y", "index", "hidden", "rows", "tokens", "width"),
        num_warps=WARPS,
        min_occupancy=0.75,
        streaming=True,
        scalars=2,  # index and null flag of a token's sample
        bytes_min=moved + batch * 9,
        bytes_actual=moved + batch * tokens * 9,
    )  # fmt: skip


def _bench(
    preset: str, image_px: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, int, float]:
    """The MLLM sees every image at 448 px: 256 tokens of width 1536 for all presets and image sizes."""
    del image_px
    x_BNF = torch.randn(16, 256, 1536, device=device, dtype=dtype)
    return x_BNF, torch.arange(16, device=device), 0, 0.45 if preset == "xl" else 0.85


OP = Op(
    name="mask_tokens",
    fused=mask_tokens,
    reference=reference,
    cases=(
        _case("one token", (1, 1, 16), 0.5),
        _case("odd lengths", (3, 7, 33), 0.5),
        _case("null samples", (2, 5, 8), 0.3, hidden=True),
        _case("seed of 64 bits", (2, 5, 8), 0.5, seed=(1 << 63) + 7),
        _case("nothing kept", (2, 3, 16), 1.0),
        _case("everything kept", (2, 3, 16), 0.0),
        _case("two column tiles", (1, 2, 600), 0.5),
        _case("empty batch", (0, 4, 16), 0.5),
        Case(name="non-contiguous", make=_strided),
    ),
    differentiable=(0,),
    bytes_moved=_masked_bytes,
    bytes_issued=_issued_bytes,
    compiles=(_compile("bf16", 1536), _compile("fp32", 1536)),
    bench=_bench,
)
