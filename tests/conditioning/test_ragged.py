"""Packed prefixes: rows behind the last token, tokens without a row, and what transformers is told."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from iomm.conditioning import prompts, ragged
from iomm.conditioning.mllm import open_mllm
from iomm.conditioning.prefix import PackedPrefix
from iomm.conditioning.prompts import PrefixBuilder
from iomm.config import ConditionConfig, MllmConfig
from iomm_kernels.pack_tokens import packed_capacity
from tests.tiny_models import MLLMS

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=MLLMS)
def mllm(request, tmp_path_factory):
    folder = MLLMS[request.param](tmp_path_factory.mktemp("mllm"))
    return open_mllm(MllmConfig(path=str(folder)), torch.float64, CPU)


@pytest.fixture
def capacity(monkeypatch):
    """Give packed prefixes `change` more rows than they need."""

    def more(change):
        monkeypatch.setattr(
            prompts, "packed_capacity", lambda *args, **kwargs: packed_capacity(*args, **kwargs) + change
        )

    return more


def inputs(mllm, samples=3):
    torch.manual_seed(0)
    width = mllm.vision(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[-1]
    patches = torch.randn(samples, mllm.image_tokens, width, dtype=torch.float64)
    keep = torch.arange(samples * mllm.image_tokens).view(samples, -1) % 2 == 0
    return patches, keep, torch.randn(samples, 3, mllm.width, dtype=torch.float64)


def builder(mllm, mode="drop"):
    config = ConditionConfig(aux_prompt="the same", null_prompt="none", mask_mode=mode)
    return PrefixBuilder(mllm, config)


def states(mllm, prefix, q_BQD):
    encoded = mllm.encode_prefix(prefix)
    return torch.cat((encoded.states_BPD[prefix.attend_BP], mllm.run_queries(q_BQD, encoded).flatten(0, 1)))


@torch.no_grad()
def test_rows_behind_the_last_token_change_nothing_and_are_finite(mllm, capacity):
    patches, keep, q_BQD = inputs(mllm)
    exact = builder(mllm).for_images(patches, keep)
    capacity(7)
    padded = builder(mllm).for_images(patches, keep)
    assert len(padded.c_TD) == len(exact.c_TD) + 7
    torch.testing.assert_close(states(mllm, padded, q_BQD), states(mllm, exact, q_BQD), rtol=0, atol=1e-12)
    assert mllm.encode_prefix(padded).states.isfinite().all()


@torch.no_grad()
def test_tokens_that_find_no_row_are_counted_and_nobody_attends_to_them(mllm, capacity):
    patches, keep, q_BQD = inputs(mllm)
    capacity(-1)
    build = builder(mllm)
    cut = build.for_images(patches, keep)
    assert int(cut.packed.dropped) == int(build.dropped) == 1
    build.for_images(patches, keep)
    assert int(build.dropped) == 2
    keep[-1, keep[-1].nonzero()[-1]] = False
    capacity(0)
    without = builder(mllm).for_images(patches, keep)
    assert torch.equal(cut.attend_BP, without.attend_BP)
    torch.testing.assert_close(states(mllm, cut, q_BQD), states(mllm, without, q_BQD), rtol=0, atol=1e-12)


def test_a_bound_from_the_mask_ratio_holds_what_a_training_batch_keeps(mllm):
    patches, _, _ = inputs(mllm, 16)
    config = ConditionConfig(mask_mode="drop", mask_ratio=0.5, null_probability=0.0)
    build, index_B = PrefixBuilder(mllm, config), torch.arange(16)
    exact = build.for_training([None] * 16, patches, 0, index_B)
    texts, keep = [config.aux_prompt] * 16, exact.attend_BP[:, -mllm.image_tokens :]
    image_B = torch.ones(16, dtype=torch.bool)
    bounded = build._build(texts, patches, image_B, keep, (keep.numel(), config.mask_ratio))
    assert torch.equal(bounded.attend_BP, exact.attend_BP)
    assert int(build.dropped) == 0
    assert len(exact.c_TD) <= len(bounded.c_TD) <= bounded.attend_BP.numel()


def test_padding_a_packed_prefix_gives_the_hidden_one_with_blanks(mllm):
    patches, keep, _ = inputs(mllm)
    packed = builder(mllm).for_images(patches, keep)
    hidden = builder(mllm, "hide").for_images(patches, keep)
    assert isinstance(packed, PackedPrefix)
    padded = packed.padded()
    for name in ("attend_BP", "position_BPA", "length_B"):
        assert torch.equal(getattr(padded, name), getattr(hidden, name))
    shown = hidden.attend_BP[..., None]
    assert torch.equal(padded.c_BPD, hidden.c_BPD * shown)
    if hidden.deepstack_BPF is not None:
        assert torch.equal(padded.deepstack_BPF, hidden.deepstack_BPF * shown)


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_attention_is_back_afterwards_even_after_an_error(mllm, monkeypatch, fails):
    patches, keep, _ = inputs(mllm)
    before, seen = mllm.lm.config._attn_implementation, []

    def attend(*args):
        seen.append(mllm.lm.config._attn_implementation)
        if fails:
            raise MemoryError
        return torch.zeros_like(args[0])

    monkeypatch.setattr(ragged, "_causal_by_sample", attend)
    prefix = builder(mllm).for_images(patches, keep)
    if fails:
        with pytest.raises(MemoryError):
            mllm.encode_prefix(prefix)
    else:
        mllm.encode_prefix(prefix)
    assert set(seen) == {ragged.NAME}
    assert mllm.lm.config._attn_implementation == before != ragged.NAME


def test_a_model_that_attends_within_a_window_is_refused_with_the_way_out(mllm, monkeypatch):
    patches, keep, _ = inputs(mllm)
    attention = ragged._attention
    monkeypatch.setattr(
        ragged, "_attention", lambda *args, **kwargs: attention(*args, **kwargs | {"sliding_window": 4})
    )
    with pytest.raises(ValueError, match=r"layer 0 .* window of 4 tokens.* condition.mask_mode=hide"):
        mllm.encode_prefix(builder(mllm).for_images(patches, keep))


def heads(rows):
    torch.manual_seed(1)
    return (torch.randn(rows, n, 16, dtype=torch.float64) for n in (4, 2, 2))


def test_a_block_diagonal_mask_equals_a_sample_at_a_time():
    q, k, v = heads(13)
    cu_S = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    one_by_one = ragged._causal_by_sample(q, k, v, cu_S.tolist(), 0.3)
    at_once = ragged._sdpa(q, k, v, scale=0.3, attn_mask=ragged.block_diagonal(cu_S, 13))
    torch.testing.assert_close(at_once[:11], one_by_one[:11], rtol=0, atol=1e-12)
    assert at_once.isfinite().all()


def test_pytorchs_varlen_attention_takes_the_call_of_the_cuda_path():
    with FakeTensorMode():
        q, k, v = (x.to(torch.bfloat16) for x in heads(13))
        out = ragged._causal_flash(q, k, v, torch.tensor([0, 4, 11], dtype=torch.int32), 9, 0.3)
    assert out.shape == (13, 4, 16)
