"""Where the tokens of a batch go when those that count stand one after the other (`pack_tokens`).

    rows of a sample   [ text slots 0 .. A-1 | patch slots A .. P-1 ],  P = A + N
    that count         text slot a < count[b];  patch slot n with keep[b, n]
    cu[b + 1]          tokens that count in samples 0 .. b, at most the capacity
    row[b, p]          number of tokens that count before slot (b, p); -1 where it does not count or fit
    source[t]          b P + p with row[b, p] = t; -1 behind the last row
    dropped            tokens that count and do not fit: the last ones

Shapes: count_B integers; keep_BN bool; cu_S, source_T, row_BP, dropped int32, S = B + 1, T the capacity. B
samples, A text slots, N patch slots.
Bytes: one launch, in which sample b counts the flags of the samples before it: N B^2 / 2 bytes, out of L2.

Not yet run on a GPU.
"""

import torch
from torch import Tensor

from iomm_kernels.launch import jit, resolve, tl
from iomm_kernels.record import Compile

BLOCK = 256  # slots of a step


# --- reference ------------------------------------------------------------------------------------------


def reference(
    count_B: Tensor, keep_BN: Tensor, text_slots: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cu_S, source_T, row_BP, dropped."""
    slot_A = torch.arange(text_slots, device=keep_BN.device)
    counts_BP = torch.cat((slot_A < count_B[:, None], keep_BN), dim=1)
    rank = counts_BP.flatten().cumsum(0) - 1
    fits = counts_BP.flatten() & (rank < capacity)
    slots = torch.arange(len(rank), device=rank.device)
    # One row more takes what does not count or fit.
    source_T = rank.new_full((capacity + 1,), -1).scatter(0, torch.where(fits, rank, capacity), slots)[:-1]
    end_B = counts_BP.sum(1).cumsum(0)
    cu_S = torch.cat((end_B.new_zeros(1), end_B)).clamp_max(capacity)
    dropped = (counts_BP.sum() - capacity).clamp_min(0)
    row_BP = torch.where(fits, rank, -1).view(counts_BP.shape)
    return cu_S.int(), source_T.int(), row_BP.int(), dropped.int()


# --- kernel ---------------------------------------------------------------------------------------------


@jit
def index_kernel(
    count_ptr, keep_ptr, cu_ptr, source_ptr, row_ptr, dropped_ptr, samples, A, N, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program places the tokens of one sample; the last one fills what is behind them."""
    b = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, b, BLOCK):
        count = tl.load(count_ptr + start + lane, mask=start + lane < b, other=0)
        before += tl.minimum(tl.maximum(count, 0), A)
    for start in range(0, b * N, BLOCK):
        before += tl.load(keep_ptr + start + lane, mask=start + lane < b * N, other=0).to(tl.int32)
    first = tl.sum(before)
    mine = tl.minimum(tl.maximum(tl.load(count_ptr + b), 0), A)
    slot = b * (A + N)
    for start in range(0, A, BLOCK):
        a = start + lane
        there = (a < mine) & (first + a < capacity)
        tl.store(source_ptr + first + a, slot + a, mask=there)
        tl.store(row_ptr + slot + a, tl.where(there, first + a, -1), mask=a < A)
    end = first + mine
    for start in range(0, N, BLOCK):
        n = start + lane
        keep = tl.load(keep_ptr + b * N + n, mask=n < N, other=0).to(tl.int32)
        row = end + tl.cumsum(keep) - keep
        there = (keep != 0) & (row < capacity)
        tl.store(source_ptr + row, slot + A + n, mask=there)
        tl.store(row_ptr + slot + A + n, tl.where(there, row, -1), mask=n < N)
        end += tl.sum(keep)
    tl.store(cu_ptr + b + 1, tl.minimum(end, capacity))
    if b == 0:
        tl.store(cu_ptr, 0)
    if b == samples - 1:
        tl.store(dropped_ptr, tl.maximum(end - capacity, 0))
        for start in range(end, capacity, BLOCK):
            tl.store(source_ptr + start + lane, -1, mask=start + lane < capacity)


# --- operator -------------------------------------------------------------------------------------------


@torch.library.custom_op("iomm_kernels::pack_index", mutates_args=())
def pack_index(
    count_B: Tensor, keep_BN: Tensor, text_slots: int, capacity: int, provider: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cu_S, source_T, row_BP, dropped."""
    chosen = resolve("pack_index", provider, keep_BN.device.type)
    if chosen == "csrc":
        return torch.ops.iomm_csrc.pack_index(count_B, keep_BN, text_slots, capacity)
    if chosen == "eager" or not len(count_B):
        return reference(count_B, keep_BN, text_slots, capacity)
    outputs = _outputs(keep_BN, text_slots, capacity)
    index_kernel[(len(count_B),)](
        count_B.int().contiguous(), keep_BN.contiguous().view(torch.int8), *outputs, len(count_B), text_slots,
        keep_BN.shape[1], capacity, BLOCK=BLOCK,
    )  # fmt: skip
    return outputs


def _outputs(keep_BN: Tensor, text_slots: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N = keep_BN.shape
    shapes = ((B + 1,), (capacity,), (B, text_slots + N), ())
    cu_S, source_T, row_BP, dropped = (keep_BN.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return cu_S, source_T, row_BP, dropped


@pack_index.register_fake
def _(count_B, keep_BN, text_slots, capacity, provider):
    return _outputs(keep_BN, text_slots, capacity)


# --- record ---------------------------------------------------------------------------------------------


def bytes_moved(count_B: Tensor, keep_BN: Tensor, text_slots: int, capacity: int) -> int:
    """Inputs and outputs once; counts as int32."""
    B, N = keep_BN.shape
    return 4 * B + B * N + 4 * (B + 1 + capacity + B * (text_slots + N) + 1)


def bytes_issued(count_B: Tensor, keep_BN: Tensor, text_slots: int, capacity: int) -> int:
    """What the kernel loads and stores."""
    B, N = keep_BN.shape
    return bytes_moved(count_B, keep_BN, text_slots, capacity) + (4 + N) * B * (B - 1) // 2


def compiles() -> tuple[Compile, ...]:
    """At 64 samples of 8 text and 256 patch tokens, of which 15 % are kept."""
    B, A, N, capacity = 64, 8, 256, 3264
    pointers = dict.fromkeys(("count_ptr", "cu_ptr", "source_ptr", "row_ptr", "dropped_ptr"), "*i32")
    numbers = dict.fromkeys(("samples", "A", "N", "capacity"), "i32")
    shape = torch.empty(B), torch.empty(B, N), A, capacity
    return (
        Compile(
            name="pack_tokens index",
            kernel=index_kernel,
            signature=pointers | {"keep_ptr": "*i8"} | numbers,
            constexprs={"BLOCK": BLOCK},
            aligned=(*pointers, "keep_ptr", "N", "capacity"),
            num_warps=4,
            min_occupancy=0.5,
            streaming=False,
            bytes_min=bytes_moved(*shape),
            bytes_actual=bytes_issued(*shape),
        ),
    )
