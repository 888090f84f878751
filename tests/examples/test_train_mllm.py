"""The tiny MLLM: its tokenizer, its training, and what the shipped one has learned."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from transformers import AutoImageProcessor, AutoTokenizer

from examples.tiny.mllm_choice import BestStep
from examples.tiny.mllm_data import (
    CaptionedImage,
    Emoji,
    background_mask,
    collate,
    framed,
    heldout_scenes,
    is_set_aside,
    load_emoji,
    pixels,
    training_batch,
    training_sample,
)
from examples.tiny.mllm_model import (
    AUX_PROMPTS,
    NULL_PROMPT,
    MllmTraining,
    alignment_loss,
    build_model,
    image_prefix,
    query_loss,
)
from examples.tiny.mllm_report import (
    TinyMllm,
    blank,
    caption_loss,
    describe,
    load_tiny_mllm,
    own,
    retrieval,
    same_words,
    words_right,
)
from examples.tiny.mllm_vision import VisionTraining, add_vision, vision_phase, vision_weights
from examples.tiny.shape_scenes import COLOURS, SHAPES, draw_scene, sample_scene
from examples.tiny.train_mllm import save_model, starting_point, train

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "tiny" / "mllm"
DATA = ROOT / "examples" / "data" / "fluent_emoji"
SMALL = MllmTraining(
    steps=3,
    batch_images=4,
    warm_up_steps=2,
    vision_width=32,
    vision_layers=1,
    text_width=32,
    text_layers=2,
    align_layer=1,
)


@cache
def shipped() -> TinyMllm:
    return load_tiny_mllm(SHIPPED)


@cache
def reference() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))


@cache
def heldout_emoji() -> list[CaptionedImage]:
    emoji = load_emoji(sorted(DATA.glob("heldout-*.tar")))
    return [CaptionedImage(image=e.image, caption=e.label) for e in emoji]


def drawn_emoji(count: int) -> list[Emoji]:
    """Stand-ins for emoji, so that training tests need not read the shards."""
    made = []
    for i in range(count):
        scene = sample_scene(np.random.default_rng([5, i]))
        image = draw_scene(scene)
        made.append(Emoji(key=str(i), label=scene.sentence, image=image, ground=background_mask(image)))
    return made


def test_autotokenizer_and_sentencepiece_give_the_same_ids_for_captions_and_prompts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    captions = [s.caption for s in heldout_emoji()] + [s.caption for s in heldout_scenes(50, seed=1)]
    odd = [
        "",
        "  two   spaces ",
        "Ünïcödé 日本語 🙂",
        "A\tb\nc",
        "ﬁ ½ é",
        "x" * 60,
        "“quoted” & (bracketed)!",
    ]
    for text in (*captions, *AUX_PROMPTS, NULL_PROMPT, *odd):
        assert tokenizer.encode(text) == reference().encode(text), text


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.text(
        alphabet=st.characters(
            min_codepoint=32, max_codepoint=0x24F, exclude_characters="<", exclude_categories=("Cc", "Cf")
        ),
        max_size=40,
    )
)
def test_any_printable_latin_text_encodes_to_the_same_ids_and_comes_back(text: str) -> None:
    tokenizer = shipped().tokenizer
    tokens = tokenizer.encode(text)
    assert tokens == reference().encode(text)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens


def test_captions_come_back_from_their_ids_in_lower_case() -> None:
    tokenizer = shipped().tokenizer
    for text in (
        "three green triangles",
        "flag: Côte d’Ivoire",
        "a red circle above a blue square",
        AUX_PROMPTS[0],
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text.lower().replace("’", "’")


def test_special_tokens_are_those_of_the_config() -> None:
    tokenizer, config = shipped().tokenizer, shipped().model.config
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config.image_token_id
    assert tokenizer.pad_token_id == config.text_config.pad_token_id
    assert tokenizer.eos_token_id == config.text_config.eos_token_id
    assert len(tokenizer) == config.text_config.vocab_size


def test_a_few_steps_run_and_repeat_bit_for_bit() -> None:
    emoji, tokenizer = drawn_emoji(6), shipped().tokenizer
    first = train(SMALL, emoji, tokenizer).state_dict()
    second = train(SMALL, emoji, tokenizer).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls_in_training() -> None:
    seen: list[float] = []

    def watch(step: int, model: torch.nn.Module, parts: dict[str, float]) -> bool:
        seen.append(parts["image_caption"])
        return False

    longer = replace(SMALL, steps=25, batch_images=8, learning_rate=5e-3)
    train(longer, drawn_emoji(6), shipped().tokenizer, watch)
    assert len(seen) == 25
    assert np.mean(seen[-5:]) < 0.75 * np.mean(seen[:5])


def test_aligned_training_draws_the_states_behind_pictures_and_captions_together() -> None:
    seen: list[dict[str, float]] = []

    def watch(step: int, model: torch.nn.Module, parts: dict[str, float]) -> bool:
        seen.append(parts)
        return False

    aligned = replace(
        SMALL, steps=30, batch_images=8, learning_rate=5e-3, query_weight=1.0, patch_words_weight=0.5
    )
    train(aligned, drawn_emoji(6), shipped().tokenizer, watch)
    for name in ("queries", "patch_words"):
        losses = [parts[name] for parts in seen]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3, name


def test_queries_stand_right_behind_each_caption_however_far_it_is_padded() -> None:
    samples = [
        *heldout_scenes(2, seed=2),
        CaptionedImage(image=heldout_scenes(1, seed=3)[0].image, caption="ring"),
    ]
    batch, model = collate(samples, shipped().tokenizer), shipped().model
    wider = replace(batch, caption_BS=torch.nn.functional.pad(batch.caption_BS, (0, 5)))
    with torch.no_grad():
        prefix_BLD = image_prefix(model, batch.pixels_BCHW, shipped().prompt_ids)
        values = [
            query_loss(
                model,
                prefix_BLD,
                model.get_input_embeddings()(b.caption_BS),
                b,
                MllmTraining(),
                np.random.default_rng(0),
            )
            for b in (batch, wider)
        ]
    torch.testing.assert_close(values[0], values[1])


def test_framed_captions_are_worded_as_prompts_are() -> None:
    samples = heldout_scenes(40, seed=2)
    kept = framed(samples, 0.0, np.random.default_rng(0))
    assert [s.caption for s in kept] == [s.caption for s in samples]
    half = framed(samples, 0.5, np.random.default_rng(0))
    assert all(old.caption in new.caption for old, new in zip(samples, half, strict=True))
    assert 8 < sum(old.caption != new.caption for old, new in zip(samples, half, strict=True)) < 32


def test_a_file_of_other_vision_rounds_is_refused(tmp_path: Path) -> None:
    file, emoji = tmp_path / "vision.safetensors", drawn_emoji(2)
    short = VisionTraining(steps=1, batch_scenes=1, batch_emoji=1)
    trained, model = build_model(SMALL, 1200), build_model(SMALL, 1200)
    with Progress(disable=True) as progress:
        vision_phase(trained, emoji, shipped().tokenizer, [short], file, progress)
        vision_phase(model, emoji, shipped().tokenizer, [short], file, progress)
        assert all(torch.equal(t, vision_weights(model)[n]) for n, t in vision_weights(trained).items())
        with pytest.raises(ValueError, match="vision rounds"):
            vision_phase(model, emoji, shipped().tokenizer, [replace(short, steps=2)], file, progress)


def test_vision_weights_are_taken_over_whole_and_the_language_model_is_left_alone() -> None:
    seen = build_model(replace(SMALL, seed=7), 1200)
    model, fresh = build_model(SMALL, 1200), build_model(SMALL, 1200)
    add_vision(model, vision_weights(seen))
    for name, tensor in model.state_dict().items():
        source = seen if "vision_tower" in name or "multi_modal_projector" in name else fresh
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_vision_weights_of_another_size_are_refused() -> None:
    wide = vision_weights(build_model(replace(SMALL, vision_width=64), 1200))
    with pytest.raises(ValueError, match="leave --vision out"):
        add_vision(build_model(SMALL, 1200), wide)


def test_training_stops_when_it_is_told_to() -> None:
    steps: list[int] = []

    def stop(step: int, model: torch.nn.Module, parts: dict[str, float]) -> bool:
        steps.append(step)
        return True

    train(SMALL, drawn_emoji(6), shipped().tokenizer, stop)
    assert steps == [1]


def test_a_saved_model_loads_offline_with_its_tokenizer_and_says_what_was_trained(tmp_path: Path) -> None:
    model = build_model(SMALL, 1200).eval()
    save_model(model, (SHIPPED / "tokenizer.model").read_bytes(), tmp_path / "mllm", SMALL, 3)
    loaded = load_tiny_mllm(tmp_path / "mllm")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
    assert loaded.tokenizer.encode(NULL_PROMPT) == reference().encode(NULL_PROMPT)
    assert json.loads((tmp_path / "mllm" / "training.json").read_text())["steps_done"] == 3
    assert not (tmp_path / "mllm.partial").exists()


def test_a_folder_without_weights_is_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m examples.tiny.train_mllm"):
        load_tiny_mllm(tmp_path)


def test_no_shards_is_an_error_that_says_how_to_build_them() -> None:
    with pytest.raises(ValueError, match="build_fluent_emoji"):
        load_emoji([])


def test_an_image_becomes_sixteen_visual_tokens_and_masked_ones_are_zero() -> None:
    mllm = shipped()
    images = pixels([s.image for s in heldout_emoji()[:2]])
    keep_BP = torch.zeros(2, 16, dtype=torch.bool)
    keep_BP[0, 3] = True
    with torch.no_grad():
        prefix_BLD = image_prefix(mllm.model, images, mllm.prompt_ids, keep_BP)
        whole_BLD = image_prefix(mllm.model, images, mllm.prompt_ids)
    patches_BPD = prefix_BLD[:, len(mllm.prompt_ids) :]
    assert patches_BPD.shape == (2, 16, mllm.model.config.text_config.hidden_size)
    assert torch.equal(patches_BPD[~keep_BP], torch.zeros_like(patches_BPD[~keep_BP]))
    assert torch.equal(patches_BPD[0, 3], whole_BLD[0, len(mllm.prompt_ids) + 3])


def test_the_stock_image_processor_makes_of_an_image_what_training_did() -> None:
    processor = AutoImageProcessor.from_pretrained(SHIPPED, local_files_only=True, backend="pil")
    image = heldout_emoji()[0].image
    made = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, pixels([image]), rtol=0, atol=1e-6)


def test_equal_captions_are_not_held_against_each_other() -> None:
    states_BD = torch.eye(3)
    states_BD[1] = states_BD[0]
    captions_BS = torch.tensor([[5, 6], [5, 6], [7, 8]])
    loss = alignment_loss(states_BD, states_BD, captions_BS, temperature=0.01)
    assert float(loss) < 1e-6


def test_samples_are_a_function_of_seed_and_index_and_alternate_emoji_and_scenes() -> None:
    emoji = drawn_emoji(6)
    again = [training_sample(emoji, 1, i) for i in (0, 1, 2)]
    for index, sample in enumerate(again):
        same = training_sample(emoji, 1, index)
        assert (same.caption, same.image.tobytes()) == (sample.caption, sample.image.tobytes())
    epoch = [training_sample(emoji, 1, 2 * i).caption for i in range(6)]
    assert all(any(caption.startswith(e.label) for caption in epoch) for e in emoji)


def test_a_step_sees_emoji_alone_or_scenes_alone_in_turn() -> None:
    emoji = drawn_emoji(6)
    labels = tuple(e.label for e in emoji)
    batches = [[s.caption for s in training_batch(emoji, 1, step, 3)] for step in range(4)]
    assert [all(c.startswith(labels) for c in captions) for captions in batches] == [True, False, True, False]
    first_epoch = batches[0] + batches[2]
    assert all(any(caption.startswith(label) for caption in first_epoch) for label in labels)


def test_a_twentieth_of_the_train_labels_is_set_aside() -> None:
    share = np.mean([is_set_aside(f"label {i}") for i in range(2000)])
    assert 0.03 < share < 0.07


def test_the_best_step_is_the_one_whose_weights_come_back() -> None:
    emoji, tokenizer = drawn_emoji(4), shipped().tokenizer
    best = BestStep(emoji, tokenizer, SMALL)
    model = build_model(SMALL, len(tokenizer))
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best.look(1, model)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(30)  # surer and wrong
    best.look(2, model)
    assert best.step == 1
    assert all(torch.equal(best.weights[name], good[name]) for name in good)


def test_a_run_continues_from_a_saved_model_and_records_what_came_before(tmp_path: Path) -> None:
    model = build_model(SMALL, 1200)
    save_model(model, (SHIPPED / "tokenizer.model").read_bytes(), tmp_path / "first", SMALL, 3)
    tokenizer_file, loaded, before = starting_point(tmp_path / "first", [], SMALL)
    assert tokenizer_file == (SHIPPED / "tokenizer.model").read_bytes()
    assert before is not None
    assert before["steps_done"] == 3
    still = replace(SMALL, steps=1, learning_rate=0.0, final_learning_rate=0.0)
    continued = train(still, drawn_emoji(6), shipped().tokenizer, model=loaded).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(continued[name], tensor.half().float(), rtol=0, atol=0)


def test_continuing_from_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        starting_point(tmp_path, [], SMALL)


def test_padding_follows_the_end_of_each_caption() -> None:
    samples = heldout_scenes(4, seed=2)
    batch = collate(samples, shipped().tokenizer)
    for row, length in zip(batch.caption_BS, batch.length_B, strict=True):
        assert row[length] == shipped().tokenizer.eos_token_id
        assert bool((row[length + 1 :] == shipped().tokenizer.pad_token_id).all())


@pytest.mark.parametrize("what", ["emoji", "scenes"])
def test_the_shipped_model_captions_heldout_pictures_better_than_a_blank_one(what: str) -> None:
    samples = heldout_emoji()[::5][:32] if what == "emoji" else heldout_scenes(32, seed=4)
    assert caption_loss(shipped(), samples, own) < caption_loss(shipped(), samples, blank)


def test_the_shipped_model_names_the_colours_of_most_heldout_scenes_and_more_shapes_than_chance() -> None:
    samples = heldout_scenes(64, seed=6)
    said, meant = describe(shipped(), [s.image for s in samples]), [s.caption for s in samples]
    assert words_right(said, meant, tuple(COLOURS)) > 0.75
    assert words_right(said, meant, tuple(SHAPES)) > 0.08  # two of eight shapes a scene: chance is about 0.05


def test_the_shipped_model_finds_the_image_of_a_heldout_caption_and_the_caption_of_an_image() -> None:
    for samples, least in ((heldout_scenes(64, seed=7), 0.6), (heldout_emoji(), 0.03)):
        recalls = retrieval(shipped(), samples)
        assert recalls["image to caption @1"] > least
        assert recalls["caption to image @1"] > least


def test_words_are_right_whatever_their_order_and_number() -> None:
    assert words_right(["two red crosses and a ring"], ["a ring and two crosses"], ("ring", "cross")) == 1.0
    assert words_right(["a red ring"], ["a blue ring"], ("red", "blue")) == 0.0
    assert same_words("A red ring and a blue star", "a blue star and a red ring")
