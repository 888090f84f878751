"""Our path through each multimodal LLM equals transformers' own forward; and what loading refuses."""

import json

import pytest
import torch

from iomm.conditioning.mllm import open_mllm
from iomm.conditioning.prompts import PrefixBuilder
from iomm.conditioning.vision import InternVLVision, QwenVision
from iomm.config import ConditionConfig, MllmConfig
from tests.tiny_models import MLLMS, save_internvl, save_qwen2_5_vl, save_qwen3_vl

AUX, AFTER, IMAGE_ID = "the same as:", [65, 66, 67, 68], 199
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=MLLMS)
def mllm(request, tmp_path_factory):
    folder = MLLMS[request.param](tmp_path_factory.mktemp(request.param))
    return open_mllm(MllmConfig(path=str(folder)), torch.float64, CPU)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = save_qwen3_vl(tmp_path_factory.mktemp("qwen3"))
    return open_mllm(MllmConfig(path=str(folder)), torch.float64, CPU)


def images(mllm, count=2):
    torch.manual_seed(5)
    return torch.randint(0, 256, (count, 3, mllm.image_px, mllm.image_px), dtype=torch.uint8)


def prefix(mllm, image, mode="zero", keep=None):
    builder = PrefixBuilder(mllm, ConditionConfig(aux_prompt=AUX, null_prompt="none", mask_mode=mode))
    patches = mllm.vision(image)
    return builder.for_images(
        patches, torch.ones(patches.shape[:2], dtype=torch.bool) if keep is None else keep
    )


def their_inputs(mllm, image):
    """The prompt [text | image | more text], as transformers wants it."""
    ids = mllm.tokenize(AUX) + [IMAGE_ID] * mllm.image_tokens + AFTER
    ids_BP = torch.tensor([ids] * len(image))
    pixels = (image.to(mllm.dtype) / 255 - mllm.mean) / mllm.std
    if not isinstance(mllm.eye, QwenVision):
        return {"input_ids": ids_BP, "pixel_values": pixels}
    grid = mllm.image_px // 4
    return {
        "input_ids": ids_BP,
        "pixel_values": mllm.eye._patches(pixels),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * len(image)),
        "mm_token_type_ids": (ids_BP == IMAGE_ID).int(),
    }


def test_the_eye_has_one_identity_whichever_device_it_is_on(mllm, monkeypatch):
    """A tensor's text names its GPU; ranks that share a cache of features have different ones."""
    known = mllm.vision_identity()

    class OnGpu:
        def __init__(self, numbers):
            self.numbers = numbers

        def flatten(self):
            return self

        def cpu(self):
            return self.numbers.flatten()

    for name in ("mean", "std"):
        monkeypatch.setattr(mllm, name, OnGpu(getattr(mllm, name)))
    assert mllm.vision_identity() == known


@torch.no_grad()
def test_prefix_and_query_rows_equal_transformers_own_forward_of_the_same_prompt(mllm):
    image = images(mllm)
    theirs = mllm.model.model(**their_inputs(mllm, image)).last_hidden_state
    encoded = mllm.encode_prefix(prefix(mllm, image))
    queries = mllm.embed(torch.tensor([AFTER] * len(image)))
    ours = torch.cat((encoded.states_BPD, mllm.run_queries(queries, encoded)), dim=1)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    naive = mllm.full(queries, encoded.prefix)
    assert (naive - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("save", [save_qwen2_5_vl, save_qwen3_vl])
def test_qwen_positions_equal_transformers_rope_index(save, tmp_path):
    mllm = open_mllm(MllmConfig(path=str(save(tmp_path))), torch.float32, CPU)
    theirs = their_inputs(mllm, images(mllm))
    theirs_3BP, _ = mllm.model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], theirs["image_grid_thw"]
    )
    p = prefix(mllm, images(mllm))
    ours_BPA = torch.cat((p.position_BPA, p.query_positions(len(AFTER))), dim=1)
    assert torch.equal(ours_BPA.permute(2, 0, 1), theirs_3BP)


def test_qwen_patches_come_in_the_order_of_qwens_own_image_processor(qwen3):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = images(qwen3)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
        size={"shortest_edge": 64, "longest_edge": 24 * 24},
    )
    theirs = processor(list(image.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 6, 6]] * 2
    ours = qwen3.eye._patches((image / 255 - qwen3.mean) / qwen3.std)
    torch.testing.assert_close(ours, theirs["pixel_values"].to(ours), rtol=0, atol=1e-5)


def test_hidden_and_dropped_patches_leave_the_positions_of_the_others_alone(mllm):
    image = images(mllm, 1)
    keep = torch.arange(mllm.image_tokens)[None] % 3 == 1
    text = len(mllm.tokenize(AUX))
    whole, dropped = prefix(mllm, image), prefix(mllm, image, "drop", keep)
    shown = torch.cat((torch.ones(1, text, dtype=torch.bool), keep), dim=1)
    assert torch.equal(dropped.position_TA, whole.position_BPA[0, shown[0]])
    for mode in ("zero", "hide", "drop"):
        masked = prefix(mllm, image, mode, keep)
        assert torch.equal(masked.query_positions(3), whole.query_positions(3))


def test_an_image_takes_one_position_a_token_in_internvl_and_one_a_side_in_qwen(mllm):
    p = prefix(mllm, images(mllm, 1))
    span = 4 if isinstance(mllm.eye, InternVLVision) else 3
    assert p.length_B.tolist() == [len(mllm.tokenize(AUX)) + span]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "hide", "drop"])
def test_deepstack_features_of_shown_patches_are_read_and_of_masked_ones_are_not(qwen3, mode):
    torch.manual_seed(6)
    builder = PrefixBuilder(qwen3, ConditionConfig(aux_prompt=AUX, null_prompt="none", mask_mode=mode))
    keep = torch.arange(9)[None] % 2 == 0
    patches = torch.randn(1, 9, 3 * 32, dtype=torch.float64)
    queries = torch.randn(1, 3, 32, dtype=torch.float64)

    def states(patches, keep):
        return qwen3.run_queries(queries, qwen3.encode_prefix(builder.for_images(patches, keep)))

    other = patches.clone()
    other[..., 32:] = torch.randn(1, 9, 64, dtype=torch.float64)  # deepstack features alone
    base = states(patches, keep)
    hidden_changed = torch.where(keep[..., None], patches, other)
    torch.testing.assert_close(states(hidden_changed, keep), base, rtol=0, atol=1e-13)
    shown_changed = torch.where(keep[..., None], other, patches)
    assert (states(shown_changed, keep) - base).abs().max() > 1e-4
    null = torch.zeros_like(keep)
    torch.testing.assert_close(states(other, null), states(patches, null), rtol=0, atol=1e-13)


def test_deepstack_stands_behind_the_first_layers_at_image_rows_only(qwen3):
    p = prefix(qwen3, images(qwen3))
    text = len(qwen3.tokenize(AUX))
    assert p.deepstack_BPF is not None
    assert p.deepstack_BPF.shape == (2, text + 9, 2 * 32)
    assert not p.deepstack_BPF[:, :text].any()
    assert torch.equal(p.deepstack_BPF[:, text:], qwen3.vision(images(qwen3))[..., 32:])


def test_patch_tokens_of_qwen_do_not_depend_on_their_batch(qwen3):
    image = images(qwen3, 3)
    together = qwen3.vision(image)
    torch.testing.assert_close(qwen3.vision(image[1:2])[0], together[1], rtol=0, atol=1e-12)


def test_qwen_sees_sixteen_tokens_a_side_unless_its_preprocessor_or_the_settings_say_otherwise(tmp_path):
    folder = save_qwen3_vl(tmp_path)
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text())

    def opened(image_px=None, **changes):
        text = json.dumps(preprocessing | {"min_pixels": None, "max_pixels": None} | changes)
        (folder / "preprocessor_config.json").write_text(text)
        return open_mllm(MllmConfig(path=str(folder), image_px=image_px), torch.float32, CPU)

    assert opened(size={"shortest_edge": 64, "longest_edge": 1 << 20}).image_tokens == 16**2
    assert opened(max_pixels=40 * 40).image_px == 40
    assert opened(min_pixels=200 * 200, max_pixels=1 << 20).image_px == 200
    assert opened(image_px=32).image_tokens == 16
    with pytest.raises(ValueError, match=r"image_px 30 must be a multiple of the 8 px of one token"):
        opened(image_px=30)
    with pytest.raises(ValueError, match=r"image_px 48 must be .* from 8 to 40 .*Choose one, or null"):
        opened(image_px=48, max_pixels=40 * 40)


def test_internvl_refuses_an_image_size_that_is_not_its_own(tmp_path):
    folder = save_internvl(tmp_path)
    assert open_mllm(MllmConfig(path=str(folder), image_px=16), torch.float32, CPU).image_px == 16
    with pytest.raises(ValueError, match=r"mllm.image_px is 32, but this InternVL sees images of 16 px only"):
        open_mllm(MllmConfig(path=str(folder), image_px=32), torch.float32, CPU)


def test_internvl3_2b_gives_256_tokens_of_width_1536_at_448_px():
    from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=[448, 448],
        patch_size=[14, 14],
        use_absolute_position_embeddings=True,
        attention_bias=True,
    )
    # The LM's own layers play no part here; one stands for the 28.
    text = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151674,
    )
    with torch.device("meta"):
        model = InternVLModel(InternVLConfig(vision_config=vision, text_config=text, downsample_ratio=0.5))
        eye = InternVLVision(model, None, {})
        out = eye(torch.empty(2, 3, eye.image_px, eye.image_px))
    assert (eye.image_px, eye.tokens) == (448, 256)
    assert out.shape == (2, 256, 1536)


@pytest.mark.parametrize(
    ("kind", "side_px", "width"), [("qwen2_5_vl", 448, 2048), ("qwen3_vl", 512, 4 * 2048)]
)
def test_qwen_2b_sized_models_give_256_tokens_with_their_own_preprocessors(kind, side_px, width):
    from transformers import AutoConfig, AutoModel

    bounds = {
        "qwen2_5_vl": {"min_pixels": 3136, "max_pixels": 12845056},
        "qwen3_vl": {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    }[kind]
    config = AutoConfig.for_model(kind, text_config={"hidden_size": 2048, "num_hidden_layers": 1})
    config.vision_config.out_hidden_size = 2048
    config.vision_config.hidden_size = {"qwen2_5_vl": 1280, "qwen3_vl": 1024}[kind]
    with torch.device("meta"):
        eye = QwenVision(AutoModel.from_config(config), None, bounds)
    deepstack = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    assert (eye.image_px, eye.tokens, 2048 * (1 + deepstack)) == (side_px, 256, width)


def test_another_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"type 'llava'; known are internvl, qwen2_5_vl, qwen3_vl\. Set"):
        open_mllm(MllmConfig(path=str(tmp_path)), torch.float32, CPU)


def test_a_hub_name_that_cannot_be_had_says_what_to_download_in_one_line():
    with pytest.raises(
        FileNotFoundError, match=r"hf download nobody/none --local-dir DIR.* mllm.path=DIR"
    ) as error:
        open_mllm(MllmConfig(path="nobody/none"), torch.float32, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_without_safetensors_says_what_to_download_and_where_to_put_it(tmp_path, pickled):
    folder = save_internvl(tmp_path / "models" / "mllm")
    (folder / "model.safetensors").unlink()
    if pickled:
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(
        FileNotFoundError, match=rf"hf download OpenGVLab/InternVL3-2B-hf --local-dir {folder}"
    ):
        open_mllm(MllmConfig(path=str(folder)), torch.float32, CPU)
