import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iomm_kernels.mask_tokens import keep_tokens
from iomm_kernels.pack_tokens import Packed, pack_tokens, packed_capacity, reference, unpack_tokens

A, N, D = 4, 6, 8


def batch(counts: list[int], keep: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """text_BAD, count_B, patch_BND, keep_BN."""
    B, generator = len(counts), torch.Generator().manual_seed(0)
    slots_BPD = torch.randn(B, A + N, D, generator=generator)
    keep_BN = torch.rand(B, N, generator=generator) < keep
    return slots_BPD[:, :A], torch.tensor(counts), slots_BPD[:, A:], keep_BN


def slots_that_count(count_B: Tensor, keep_BN: Tensor) -> Tensor:
    return torch.cat((torch.arange(A) < count_B[:, None], keep_BN), dim=1)


def test_each_sample_is_what_packing_its_row_alone_gives() -> None:
    text_BAD, count_B, patch_BND, keep_BN = batch([3, 0, 4])
    packed = pack_tokens(text_BAD, count_B, patch_BND, keep_BN, 40)
    attend, rows_BPD = slots_that_count(count_B, keep_BN), torch.cat((text_BAD, patch_BND), dim=1)
    for b, (start, stop) in enumerate(zip(packed.cu_S[:-1], packed.cu_S[1:], strict=True)):
        assert torch.equal(packed.tokens_TD[start:stop], rows_BPD[b][attend[b]])
    assert not packed.tokens_TD[packed.cu_S[-1] :].any()
    assert packed.dropped == 0


@given(st.lists(st.integers(0, A), min_size=1, max_size=4), st.floats(0, 1), st.integers(1, 45))
def test_row_and_source_are_inverse_and_nothing_is_lost_uncounted(
    counts: list[int], keep: float, capacity: int
) -> None:
    text_BAD, count_B, patch_BND, keep_BN = batch(counts, keep)
    packed = pack_tokens(text_BAD, count_B, patch_BND, keep_BN, capacity)
    there = packed.source_T >= 0
    assert torch.equal(packed.row_BP.flatten()[packed.source_T[there]], torch.arange(capacity)[there].int())
    assert int((packed.row_BP >= 0).sum()) == int(there.sum()) == int(packed.cu_S[-1])
    total = int(slots_that_count(count_B, keep_BN).sum())
    assert int(packed.cu_S[-1]) + int(packed.dropped) == total
    assert int(packed.dropped) == max(0, total - capacity)


def test_what_does_not_fit_is_dropped_from_the_end() -> None:
    args = batch([4, 4], keep=1.0)
    whole, cut = pack_tokens(*args, 20), pack_tokens(*args, 13)
    assert torch.equal(cut.tokens_TD, whole.tokens_TD[:13])
    assert cut.cu_S.tolist() == [0, 10, 13]
    assert cut.dropped == 7


def test_unpacking_puts_every_token_back_and_zeros_elsewhere() -> None:
    text_BAD, count_B, patch_BND, keep_BN = batch([3, 1])
    packed = pack_tokens(text_BAD, count_B, patch_BND, keep_BN, 32)
    counts_BP = slots_that_count(count_B, keep_BN)
    slots_BPD = torch.cat((text_BAD, patch_BND), dim=1)
    assert torch.equal(unpack_tokens(packed.tokens_TD, packed), slots_BPD * counts_BP[..., None])


def test_gradients_go_back_to_the_slots_that_count() -> None:
    text_BAD, count_B, patch_BND, keep_BN = batch([3, 1])
    leaves = text_BAD.clone().requires_grad_(), patch_BND.clone().requires_grad_()
    packed = pack_tokens(leaves[0], count_B, leaves[1], keep_BN, 32)
    weight_TD = torch.randn_like(packed.tokens_TD)
    gradients = torch.autograd.grad(packed.tokens_TD, leaves, weight_TD)
    assert torch.equal(torch.cat(gradients, dim=1), unpack_tokens(weight_TD, packed))


def test_rotary_positions_follow_their_tokens() -> None:
    args = batch([3, 1])
    packed = pack_tokens(*args, 32)
    position_BPA = torch.arange(2 * (A + N) * 3).view(2, A + N, 3) + 1
    rows = packed.rows_of(position_BPA)
    assert torch.equal(rows[: int(packed.cu_S[-1]), 0] - 1, 3 * packed.source_T[packed.source_T >= 0])
    assert not rows[int(packed.cu_S[-1]) :].any()


def test_packing_reads_nothing_back_from_the_device() -> None:
    """Tensors without values: whatever asked for one would fail."""
    text_BAD, count_B, patch_BND, keep_BN = (x.to("meta") for x in batch([3, 1]))
    packed = reference(text_BAD, count_B, patch_BND, keep_BN, 32)
    assert isinstance(packed, Packed)
    assert packed.tokens_TD.shape == (32, D)
    assert packed.longest == A + N


def test_the_capacity_holds_every_batch_and_is_not_much_more_than_the_mean() -> None:
    samples, patches, ratio = 16, 256, 0.85
    capacity = packed_capacity(0, samples * patches, ratio)
    mean = samples * patches * (1 - ratio)
    assert mean < capacity < 1.3 * mean
    kept_SN = keep_tokens(torch.arange(50 * samples), patches, 0, ratio)
    assert kept_SN.view(50, -1).sum(1).max() <= capacity


def test_the_capacity_is_exact_where_nothing_is_left_to_chance() -> None:
    assert packed_capacity(10, 256, 0.0, multiple=1) == 266
    assert packed_capacity(10, 256, 1.0, multiple=1) == 10
    assert packed_capacity(10, 256, 0.0) == 320
    with pytest.raises(ValueError, match=r"mask ratio 1.5 is outside"):
        packed_capacity(10, 256, 1.5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    text_BAD, count_B, patch_BND, keep_BN = batch([3, 1])
    with pytest.raises(ValueError, match=r"bool \(B, N\), and at least 1"):
        pack_tokens(text_BAD, count_B, patch_BND, keep_BN[:, 1:], 8)
    with pytest.raises(ValueError, match="capacity 0"):
        pack_tokens(text_BAD, count_B, patch_BND, keep_BN, 0)
    packed = pack_tokens(text_BAD, count_B, patch_BND, keep_BN, 8)
    with pytest.raises(ValueError, match="the packed sequence has 8 rows"):
        unpack_tokens(torch.zeros(7, D), packed)
