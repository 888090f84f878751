"""pack_tokens, unpack_tokens: the tokens of a batch that count, one after the other, and back.

    tokens[row] = slot    for the slots that count; text slots before patch slots, samples in order
    unpack: slot = tokens[row], 0 for slots that do not count

A prefix of which a share r of the patch tokens is masked is so about 1 - r as long (mask mode "drop").
Nothing waits for the device: `capacity` T is a bound that is known beforehand, from the mask ratio
(`packed_capacity`). What does not fit is dropped from the end, the same tokens every time, and counted in
`dropped`, a number on the device that the caller reads when it logs.

Shapes: text_BAD, patch_BND -> tokens_TD; the index is `pack_index`'s. B samples, A text slots, N patch slots,
T packed rows, D numbers a token, S = B + 1.
Numerics: copies; exact in every dtype. The gradient of each row goes back to its slot, others get 0.
Bytes: reads the tokens that count and writes T rows; backward reads T rows and writes all slots.

Not yet run on a GPU.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from iomm_kernels import pack_index
from iomm_kernels.launch import jit, next_power_of_2, resolve, tl, triton
from iomm_kernels.mask_tokens import keep_tokens
from iomm_kernels.record import Case, Compile, Op, draw


class Packed(NamedTuple):
    """Tokens of a batch in one sequence."""

    tokens_TD: Tensor
    cu_S: Tensor  # where each sample begins and ends
    source_T: Tensor  # slot b P + p of each row, its original position; -1 behind the last one
    row_BP: Tensor  # row of each slot, -1 where it does not count or did not fit
    dropped: Tensor  # number of tokens that did not fit, shape ()
    longest: int  # bound of a sample's length: P

    def rows_of(self, x_BP: Tensor) -> Tensor:
        """(T, ...) of a (B, P, ...) tensor of any dtype, such as rotary positions; zeros behind the last
        row."""
        x = x_BP.flatten(0, 1)[self.source_T.clamp_min(0)]
        return x.masked_fill((self.source_T < 0).view(-1, *(1,) * (x.ndim - 1)), 0)


# --- reference ------------------------------------------------------------------------------------------


def rows_reference(text_BAD: Tensor, patch_BND: Tensor, source_T: Tensor) -> Tensor:
    """tokens_TD."""
    slots = torch.cat((text_BAD, patch_BND), dim=1).flatten(0, 1)
    return take_reference(slots, source_T)


def take_reference(x_RD: Tensor, index_I: Tensor) -> Tensor:
    """x[index], zeros where the index is -1."""
    if not len(x_RD):
        return functional.pad(x_RD, (0, 0, 0, len(index_I)))
    return x_RD[index_I.clamp_min(0)].masked_fill((index_I < 0)[:, None], 0)


def reference(text_BAD: Tensor, count_B: Tensor, patch_BND: Tensor, keep_BN: Tensor, capacity: int) -> Packed:
    """Plain PyTorch, any floating dtype, differentiable."""
    index = pack_index.reference(count_B, keep_BN, text_BAD.shape[1], capacity)
    tokens_TD = rows_reference(text_BAD, patch_BND, index[1])
    return Packed(tokens_TD, *index, longest=index[2].shape[1])


# --- forward; backward is the same kernel with the inverse index ----------------------------------------


@jit
def take_kernel(
    text_ptr, patch_ptr, index_ptr, out_ptr, rows, A, N, width,
    TWO: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program copies ROWS rows. TWO: slot b (A + N) + p is row b A + p of the text or b N + p - A of the
    patches; else it is a row of `text`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = tl.load(index_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    first, patch = index, index
    has_first, has_patch = index >= 0, index < 0
    if TWO:
        b, p = index // (A + N), index % (A + N)
        first, patch = b * A + p, b * N + p - A
        has_patch = has_first & (p >= A)
        has_first = has_first & (p < A)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        inside = (col < width)[None, :]
        value = tl.load(
            text_ptr + first[:, None] * width + col[None, :], mask=has_first[:, None] & inside, other=0.0
        )
        if TWO:
            other = tl.load(
                patch_ptr + patch[:, None] * width + col[None, :], mask=has_patch[:, None] & inside, other=0.0
            )
            value = tl.where(has_patch[:, None], other, value)
        tl.store(out_ptr + row[:, None] * width + col[None, :], value, mask=(row < rows)[:, None] & inside)


ROWS, COLS, WARPS = 4, 512, 4


def _columns(width: int) -> int:
    return min(COLS, next_power_of_2(width))


def _launch_take(text: Tensor, patch: Tensor | None, index: Tensor, A: int, N: int) -> Tensor:
    """(len(index), D); `text` and `patch` have rows of D numbers."""
    text, rows, width = text.contiguous(), len(index), text.shape[-1]
    out = text.new_empty(rows, width)
    if out.numel():
        second = text if patch is None else patch.contiguous()
        take_kernel[(triton.cdiv(rows, ROWS),)](
            text, second, index.contiguous(), out, rows, A, N, width, TWO=patch is not None, ROWS=ROWS,
            COLS=_columns(width), num_warps=WARPS,
        )  # fmt: skip
    return out


# --- autograd -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::pack_rows", mutates_args=())
def _rows_op(text_BAD: Tensor, patch_BND: Tensor, source_T: Tensor, row_BP: Tensor, provider: str) -> Tensor:
    chosen = resolve("pack_rows", provider, text_BAD.device.type)
    if chosen == "triton":
        return _launch_take(text_BAD, patch_BND, source_T, text_BAD.shape[1], patch_BND.shape[1])
    if chosen == "csrc":
        return torch.ops.iomm_csrc.pack_rows(text_BAD, patch_BND, source_T)
    return rows_reference(text_BAD, patch_BND, source_T)


@_rows_op.register_fake
def _(text_BAD, patch_BND, source_T, row_BP, provider):
    return text_BAD.new_empty((source_T.shape[0], text_BAD.shape[2]))


@torch.library.custom_op("iomm_kernels::take_rows", mutates_args=())
def _take_op(x_RD: Tensor, index_I: Tensor, inverse_R: Tensor, provider: str) -> Tensor:
    """x[index], zeros where the index is -1; `inverse` is the index of the way back."""
    chosen = resolve("take_rows", provider, x_RD.device.type)
    if chosen == "triton":
        return _launch_take(x_RD, None, index_I, 0, 0)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.take_rows(x_RD, index_I)
    return take_reference(x_RD, index_I)


@_take_op.register_fake
def _(x_RD, index_I, inverse_R, provider):
    return x_RD.new_empty((index_I.shape[0], x_RD.shape[1]))


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text_BAD, _, source_T, row_BP, ctx.provider = inputs
    ctx.text_slots = text_BAD.shape[1]
    ctx.save_for_backward(source_T, row_BP)


def _rows_backward(ctx: Any, d_TD: Tensor) -> tuple[Any, ...]:
    source_T, row_BP = ctx.saved_tensors
    parts = row_BP[:, : ctx.text_slots], row_BP[:, ctx.text_slots :]
    grads = [
        _take_op(d_TD, part.flatten(), source_T, ctx.provider).unflatten(0, part.shape) if wanted else None
        for part, wanted in zip(parts, ctx.needs_input_grad[:2], strict=True)
    ]
    return *grads, None, None, None


_rows_op.register_autograd(_rows_backward, setup_context=_setup_rows)


def _setup_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index_I, inverse_R, ctx.provider = inputs
    ctx.save_for_backward(index_I, inverse_R)


def _take_backward(ctx: Any, d_ID: Tensor) -> tuple[Any, ...]:
    index_I, inverse_R = ctx.saved_tensors
    return _take_op(d_ID, inverse_R, index_I, ctx.provider), None, None, None


_take_op.register_autograd(_take_backward, setup_context=_setup_take)


# --- public functions -----------------------------------------------------------------------------------


def packed_capacity(
    text_tokens: int, patch_tokens: int, mask_ratio: float, sigmas: float = 6.0, multiple: int = 64
) -> int:
    """Rows that hold a batch: its text tokens, and of its patch tokens the mean number of kept ones plus
    `sigmas` standard deviations (6: one batch in 10^9 overflows), rounded up to a multiple.

    Args:
        text_tokens: of all samples together; captions are tokenised on the host, which knows.
        patch_tokens: of all images together.
    Raises:
        ValueError: a mask ratio outside [0, 1].
    """
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"mask ratio {mask_ratio} is outside [0, 1]. It is the share of masked tokens.")
    mean = patch_tokens * (1.0 - mask_ratio)
    kept = min(patch_tokens, math.ceil(mean + sigmas * math.sqrt(mean * mask_ratio)))
    return max(multiple, -(-(text_tokens + kept) // multiple) * multiple)


def pack_tokens(
    text_BAD: Tensor,
    count_B: Tensor,
    patch_BND: Tensor,
    keep_BN: Tensor,
    capacity: int,
    provider: str = "auto",
) -> Packed:
    """One sequence of the tokens that count; differentiable in text and patches.

    Args:
        count_B: text tokens of each sample, at the front of its slots.
        patch_BND: N = 0 for a batch of captions.
        keep_BN: bool, True where a patch token counts; all False for a sample without an image.
        capacity: rows of the result (`packed_capacity`); tokens beyond it are dropped from the end, and
            counted.
        provider: see `launch`.
    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    (B, A, D), N = text_BAD.shape, patch_BND.shape[1]
    fits = patch_BND.shape == (B, N, D) and keep_BN.shape == (B, N) and count_B.shape == (B,)
    if not fits or keep_BN.dtype != torch.bool or text_BAD.dtype != patch_BND.dtype or capacity < 1:
        raise ValueError(
            f"pack_tokens: text {text_BAD.dtype} {tuple(text_BAD.shape)}, count {tuple(count_B.shape)}, "
            f"patches {patch_BND.dtype} {tuple(patch_BND.shape)}, keep {keep_BN.dtype} "
            f"{tuple(keep_BN.shape)}, capacity {capacity}. Give (B, A, D), (B,), (B, N, D) of text's dtype, "
            f"bool (B, N), and at least 1."
        )
    chosen = resolve("pack_rows", provider, text_BAD.device.type)
    index = pack_index.pack_index(count_B, keep_BN, A, capacity, chosen)
    tokens_TD = _rows_op(text_BAD, patch_BND, index[1], index[2], chosen)
    return Packed(tokens_TD, *index, longest=A + N)


def unpack_tokens(x_TD: Tensor, packed: Packed, provider: str = "auto") -> Tensor:
    """(B, P, D) of rows like `packed.tokens_TD`, each at its slot, zeros elsewhere; differentiable.

    Raises:
        ValueError: another number of rows than `packed` has, or the provider cannot serve here.
    """
    if x_TD.ndim != 2 or len(x_TD) != len(packed.source_T):
        raise ValueError(
            f"unpack_tokens: x has shape {tuple(x_TD.shape)}; the packed sequence has {len(packed.source_T)} "
            f"rows. Give (T, D) with as many."
        )
    chosen = resolve("take_rows", provider, x_TD.device.type)
    rows = _take_op(x_TD, packed.row_BP.flatten(), packed.source_T, chosen)
    return rows.unflatten(0, packed.row_BP.shape)


# --- record ---------------------------------------------------------------------------------------------


def _case(
    name: str, counts: list[int], N: int, D: int, keep: float, capacity: int, A: int = 4, **more: Any
) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        B = len(counts)
        text_BAD, patch_BND = (draw(i, B, n, D, dtype=dtype, device=device) for i, n in ((1, A), (2, N)))
        keep_BN = draw(3, B, N, dtype=torch.float32, device=device).erf() < 2 * keep - 1
        return text_BAD, torch.tensor(counts, device=device, dtype=torch.int64), patch_BND, keep_BN, capacity

    return Case(name=name, make=make, **more)


def _strided(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    slots_PBD = draw(1, 9, 2, 32, dtype=dtype, device=device)
    slots_BPD = slots_PBD.transpose(0, 1)[..., ::2]
    keep_NB = torch.arange(12, device=device).view(6, 2) % 3 == 0
    return slots_BPD[:, :3], torch.tensor([3, 1], device=device), slots_BPD[:, 3:], keep_NB.T, 9


def _bytes(issued: bool, text_BAD: Tensor, count_B: Tensor, *rest: Any) -> int:
    patch_BND, keep_BN, capacity = rest
    row = text_BAD.shape[-1] * text_BAD.element_size()
    index = count_B, keep_BN, text_BAD.shape[1], capacity
    filled = int(pack_index.reference(*index)[0][-1])
    return (
        (filled + capacity) * row
        + 4 * capacity
        + (pack_index.bytes_issued(*index) if issued else pack_index.bytes_moved(*index))
    )


def _compile(dtype: str, two: bool) -> Compile:
    filled, rows, width, size = 2970, 3264 if two else 64 * 264, 1536, {"bf16": 2, "fp32": 4}[dtype]
    moved = (filled + rows) * width * size + 4 * rows
    types = {"text_ptr": f"*{dtype}", "patch_ptr": f"*{dtype}", "index_ptr": "*i32", "out_ptr": f"*{dtype}"}
    return Compile(
        name=f"pack_tokens {'rows' if two else 'rows back'} {width} {dtype}",
        kernel=take_kernel,
        signature=types | dict.fromkeys(("rows", "A", "N", "width"), "i32"),
        constexprs={"TWO": two, "ROWS": ROWS, "COLS": _columns(width)},
        aligned=(*types, "rows", "N", "width"),
        num_warps=WARPS,
        min_occupancy=0.5,
        streaming=True,
        scalars=2,  # a row's index
        bytes_min=moved,
        bytes_actual=moved,
    )


def _bench(preset: str, side_px: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The MLLM sees every image at 448 px: 256 tokens of width 1536 behind 8 of auxiliary prompt, for all
    presets and image sizes."""
    del side_px
    B, A, N, D, ratio = 16, 8, 256, 1536, 0.45 if preset == "xl" else 0.85
    text_BAD, patch_BND = (draw(i, B, n, D, dtype=dtype, device=device) for i, n in ((1, A), (2, N)))
    keep_BN = keep_tokens(torch.arange(B, device=device), N, 0, ratio)
    counts = torch.full((B,), A, device=device)
    return text_BAD, counts, patch_BND, keep_BN, packed_capacity(A * B, N * B, ratio)


OP = Op(
    name="pack_tokens",
    fused=pack_tokens,
    reference=reference,
    cases=(
        _case("one token", [1], 1, 16, 0.0, 4, A=1),
        _case("odd lengths", [3, 0, 4], 7, 24, 0.5, 32),
        _case("nothing kept", [0, 0], 5, 16, 0.0, 8),
        _case("everything kept", [4, 4], 5, 16, 1.0, 18),
        _case("more than fits", [4, 4], 5, 16, 1.0, 11),
        _case("captions only", [4, 2], 0, 16, 0.0, 8),
        _case("more slots than a block", [2, 300], 290, 1, 0.5, 640, A=300),
        _case("empty batch", [], 3, 16, 0.5, 8),
        Case(name="non-contiguous", make=_strided),
    ),
    differentiable=(0, 2),
    bytes_moved=lambda *args: _bytes(False, *args),
    bytes_issued=lambda *args: _bytes(True, *args),
    compiles=(*pack_index.compiles(), *(_compile(d, two) for d in ("bf16", "fp32") for two in (True, False))),
    bench=_bench,
)
