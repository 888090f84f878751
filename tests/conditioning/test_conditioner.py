"""The frozen-prefix split against the naive full pass, mask modes, and what the condition depends on; for
each multimodal LLM."""

import dataclasses
import functools

import pytest
import torch

from iomm.conditioning.conditioner import Conditioner
from iomm.conditioning.mllm import open_mllm
from iomm.conditioning.prompts import PrefixBuilder
from iomm.config import ConditionConfig, ConnectorConfig, MllmConfig
from tests.tiny_models import MLLMS

AUX, NULL = "the same as:", "an image."


@pytest.fixture(scope="module", params=MLLMS)
def folder(request, tmp_path_factory):
    return MLLMS[request.param](tmp_path_factory.mktemp("mllm"))


@functools.cache
def opened(folder, dtype):
    return open_mllm(MllmConfig(path=str(folder), max_caption_tokens=64), dtype, torch.device("cpu"))


def random_patches(mllm, count):
    """Patch tokens, deepstack features included."""
    numbers = mllm.vision(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[-1]
    torch.manual_seed(2)
    return torch.randn(count, mllm.image_tokens, numbers, dtype=mllm.dtype)


def setup(folder, dtype=torch.float64, **settings):
    mllm = opened(folder, dtype)
    config = ConditionConfig(
        queries=6,
        adapter_heads=4,
        mask_ratio=0.5,
        aux_prompt=AUX,
        null_prompt=NULL,
        null_probability=0.2,
        connector=ConnectorConfig(kind="transformer", layers=1, heads=4),
        **settings,
    )
    torch.manual_seed(1)
    conditioner = Conditioner(config, mllm.width, 24, dtype)
    torch.nn.init.normal_(conditioner.adapter.queries)
    return mllm, conditioner


def prefix(mllm, conditioner, captions):
    patches = random_patches(mllm, len(captions))
    builder = PrefixBuilder(mllm, conditioner.config)
    return builder.for_training(captions, patches, seed=3, index_B=torch.arange(len(captions)))


def outputs_and_gradients(mllm, conditioner, prefix_):
    conditioner.zero_grad()
    out, attend = conditioner(mllm, prefix_)
    if attend is not None:
        out = out[attend]  # padding positions have no meaning
    torch.manual_seed(4)
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {
        name: p.grad.clone() for name, p in conditioner.named_parameters() if p.grad is not None
    }


BATCHES = {
    "images": [None] * 5,
    "ragged captions": ["a", "two dogs", "a long caption of a red apple", "x y z", "cat"],
    "mixed": [None, "two dogs", None, "a long caption of a red apple on a table, well lit", None],
}


@pytest.mark.parametrize("captions", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("mode", ["zero", "hide", "drop"])
@pytest.mark.parametrize("tokens", ["queries", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_prefix_split_equals_the_naive_full_pass_in_outputs_and_gradients(
    folder, captions, mode, tokens, dtype, tolerance
):
    mllm, conditioner = setup(folder, dtype, mask_mode=mode, condition_tokens=tokens)
    p = prefix(mllm, conditioner, captions)
    split_out, split_grads = outputs_and_gradients(mllm, conditioner, p)
    conditioner.config = dataclasses.replace(conditioner.config, prefix_split=False)
    naive_out, naive_grads = outputs_and_gradients(mllm, conditioner, p)
    assert (split_out - naive_out).abs().max() <= tolerance * naive_out.abs().max()
    assert split_grads.keys() == naive_grads.keys()
    assert split_grads["adapter.queries"].abs().max() > 0
    largest = max(g.abs().max() for g in naive_grads.values())
    for name, gradient in naive_grads.items():
        assert (split_grads[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("captions", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("tokens", ["queries", "all"])
def test_hide_and_drop_give_the_same_condition(folder, captions, tokens):
    out = {}
    for mode in ("hide", "drop"):
        mllm, conditioner = setup(folder, mask_mode=mode, condition_tokens=tokens)
        out[mode] = outputs_and_gradients(mllm, conditioner, prefix(mllm, conditioner, captions))
    torch.testing.assert_close(out["hide"][0], out["drop"][0], rtol=0, atol=1e-10)
    assert out["hide"][1].keys() == out["drop"][1].keys()
    for name, gradient in out["hide"][1].items():
        # A bias of all keys alike changes no attention.
        assert name == "adapter.key.bias" or gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, out["drop"][1][name], rtol=1e-9, atol=1e-10)


def edit_condition(folder, instructions, mode="zero", **layout):
    mllm, conditioner = setup(folder, mask_mode=mode)
    keep_BN = torch.arange(2 * mllm.image_tokens).view(2, -1) % 3 > 0
    edits = PrefixBuilder(mllm, conditioner.config)
    patches_BNF = random_patches(mllm, 2)
    image = conditioner(mllm, edits.for_images(patches_BNF, keep_BN))[0]
    return conditioner(mllm, edits.for_edits(patches_BNF, keep_BN, instructions, **layout))[0], image


def test_the_instruction_of_an_edit_stands_where_the_auxiliary_prompt_does(folder):
    with_aux, image = edit_condition(folder, [AUX, AUX])
    assert torch.equal(with_aux, image)
    plain, _ = edit_condition(folder, ["make it red", "remove the ball"])
    behind, _ = edit_condition(folder, [f"make it red {AUX}", f"remove the ball {AUX}"])
    kept, _ = edit_condition(folder, ["make it red", "remove the ball"], aux_prompt=True)
    assert torch.equal(kept, behind) and (kept - plain).abs().max() > 1e-4


def test_hide_and_drop_give_the_same_condition_of_an_edit(folder):
    texts = ["make it red", "remove the ball on the table"]
    hide, drop = (edit_condition(folder, texts, mode)[0] for mode in ("hide", "drop"))
    torch.testing.assert_close(hide, drop, rtol=0, atol=1e-10)


def test_zero_and_hide_differ_where_tokens_are_masked(folder):
    outs = []
    for mode in ("zero", "hide"):
        mllm, conditioner = setup(folder, mask_mode=mode)
        outs.append(conditioner(mllm, prefix(mllm, conditioner, [None] * 4))[0])
    assert (outs[0] - outs[1]).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["zero", "hide", "drop"])
def test_a_samples_condition_does_not_depend_on_its_batch(folder, mode):
    mllm, conditioner = setup(folder, mask_mode=mode)
    captions = BATCHES["mixed"]
    together = conditioner(mllm, prefix(mllm, conditioner, captions))[0]
    builder = PrefixBuilder(mllm, conditioner.config)
    patches = random_patches(mllm, len(captions))
    for i, caption in enumerate(captions):
        alone = builder.for_training([caption], patches[i : i + 1], seed=3, index_B=torch.tensor([i]))
        torch.testing.assert_close(conditioner(mllm, alone)[0][0], together[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["zero", "hide", "drop"])
def test_masked_patches_cannot_be_read(folder, mode):
    mllm, conditioner = setup(folder, mask_mode=mode)
    builder = PrefixBuilder(mllm, conditioner.config)
    keep = torch.arange(mllm.image_tokens).expand(2, -1) % 3 == 0
    patches = random_patches(mllm, 2)
    changed = torch.where(keep[..., None], patches, torch.randn_like(patches))
    a = conditioner(mllm, builder.for_images(patches, keep))[0]
    torch.testing.assert_close(conditioner(mllm, builder.for_images(changed, keep))[0], a, rtol=0, atol=1e-12)
    shown = torch.where(keep[..., None], torch.randn_like(patches), patches)
    assert (conditioner(mllm, builder.for_images(shown, keep))[0] - a).abs().max() > 1e-4


def test_split_sends_no_gradient_to_the_frozen_model(folder):
    mllm, conditioner = setup(folder)
    outputs_and_gradients(mllm, conditioner, prefix(mllm, conditioner, [None, "cat"]))
    assert all(p.grad is None and not p.requires_grad for p in mllm.model.parameters())


def test_raw_condition_without_adapter_uses_the_mllm_states(folder):
    mllm, _ = setup(folder)
    config = ConditionConfig(
        queries=0,
        condition_tokens="all",
        aux_prompt=AUX,
        null_prompt=NULL,
        connector=ConnectorConfig(kind="linear"),
    )
    conditioner = Conditioner(config, mllm.width, 24, torch.float64)
    p = PrefixBuilder(mllm, config).for_text(["two dogs", "a"])
    out, attend = conditioner(mllm, p)
    assert out.shape == (2, 8, 24)
    assert attend.sum(1).tolist() == [8, 1]


def test_a_long_caption_is_refused_with_the_limit(folder):
    mllm, conditioner = setup(folder)
    with pytest.raises(ValueError, match=r"has 65 tokens; the limit is mllm.max_caption_tokens = 64"):
        PrefixBuilder(mllm, conditioner.config).for_text(["x" * 65])


def test_a_missing_mllm_folder_says_what_to_put_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing.*InternVL3-2B-hf"):
        open_mllm(MllmConfig(path=str(tmp_path / "none")), torch.float32, torch.device("cpu"))


def test_vision_keeps_the_number_and_width_of_tokens_at_any_image_size(folder):
    mllm, _ = setup(folder, torch.float32)
    for side in (16, 40):
        image = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
        assert mllm.vision(image).shape == (3, *random_patches(mllm, 1).shape[1:])
