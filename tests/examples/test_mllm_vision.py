"""The tiny MLLM's vision phase: what each visual token is taught, and that a few steps teach it."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.tiny.mllm_data import Emoji, background_mask
from examples.tiny.mllm_model import MllmTraining, build_model
from examples.tiny.mllm_vision import (
    GROUNDS,
    VisionTraining,
    cell_targets,
    piece_mixtures,
    pretrain_vision,
    vision_weights,
)
from examples.tiny.shape_scenes import SHAPES, Scene, Thing, draw_scene, sample_scene

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny" / "mllm"
SMALL = MllmTraining(vision_width=32, vision_layers=1, text_width=32, text_layers=1)
QUICK = VisionTraining(steps=3, batch_scenes=3, batch_emoji=2, warm_up_steps=2)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)


def drawn_emoji(count: int) -> list[Emoji]:
    """Stand-ins for emoji, so that these tests need not read the shards."""
    made = []
    for i in range(count):
        scene = sample_scene(np.random.default_rng([5, i]))
        image = draw_scene(scene)
        made.append(Emoji(key=str(i), label=scene.sentence, image=image, ground=background_mask(image)))
    return made


def test_a_cell_is_told_the_thing_that_covers_it_and_the_background_elsewhere() -> None:
    ring = Thing(shape="ring", colour="blue", x=0.87, y=0.13, radius=0.1)
    star = Thing(shape="star", colour="red", x=0.13, y=0.87, radius=0.1)
    targets = cell_targets([Scene(things=(ring, star), sentence="", background="pink")])
    shape_PP, colour_PP = targets.shape_BP.view(4, 4), targets.colour_BP.view(4, 4)
    assert shape_PP[0, 3] == 1 + SHAPES.index("ring")
    assert shape_PP[3, 0] == 1 + SHAPES.index("star")
    assert int((shape_PP > 0).sum()) == 2
    assert colour_PP[0, 3] == GROUNDS.index("blue")
    assert colour_PP[1, 1] == GROUNDS.index("pink")
    assert targets.centres_BP.view(4, 4)[0, 3] == 1
    assert int(targets.centres_BP.sum()) == 2


def test_a_cell_is_told_which_of_its_points_a_thing_covers() -> None:
    square = Thing(shape="square", colour="yellow", x=0.625, y=0.375, radius=0.1)
    cover_PM = cell_targets([Scene(things=(square,), sentence="", background="red")]).cover_BPM[0]
    assert cover_PM.shape == (16, 64)
    assert int(cover_PM.sum()) == int(cover_PM[4 + 2].sum())  # all in the cell of its centre
    middle = cover_PM[4 + 2].view(8, 8)
    assert bool(middle[2:6, 2:6].all())
    assert int(middle[0].sum()) == 0


def test_every_thing_of_a_drawn_scene_is_counted_once() -> None:
    scenes = [sample_scene(np.random.default_rng(i)) for i in range(50)]
    alone = [s for s in scenes if len(s.things) <= 2]
    counted_B = cell_targets(alone).centres_BP.sum(dim=1)
    assert counted_B.tolist() == [len(s.things) for s in alone]


def test_visual_tokens_come_row_by_row() -> None:
    model = build_model(SMALL, len(tokenizer()))
    where_BHWC = torch.arange(64.0).view(1, 8, 8, 1).repeat(1, 1, 1, 4)
    first_HW = model.model.pixel_shuffle(where_BHWC, 0.5)[0, :, :, 0]
    assert first_HW.flatten().tolist() == [16 * row + 2 * column for row in range(4) for column in range(4)]


def test_a_label_is_an_equal_mixture_of_its_pieces() -> None:
    emoji = drawn_emoji(3)
    mixture_NV = piece_mixtures(emoji, tokenizer())
    torch.testing.assert_close(mixture_NV.sum(dim=1), torch.ones(3))
    for row, one in zip(mixture_NV, emoji, strict=True):
        ids = tokenizer().encode(one.label, add_special_tokens=False)
        assert set(row.nonzero().flatten().tolist()) == set(ids)


def test_a_few_steps_repeat_bit_for_bit_and_leave_the_language_model_alone() -> None:
    emoji, made = drawn_emoji(4), []
    for _ in range(2):
        model = build_model(SMALL, len(tokenizer()))
        pretrain_vision(model, emoji, tokenizer(), QUICK)
        made.append(model.state_dict())
    fresh = build_model(SMALL, len(tokenizer())).state_dict()
    trained = vision_weights(model)
    assert all(torch.equal(made[0][name], made[1][name]) for name in fresh)
    assert all(torch.equal(made[0][name], fresh[name]) for name in fresh if name not in trained)
    assert not all(torch.equal(made[0][name], fresh[name]) for name in trained)


def test_the_vision_losses_fall() -> None:
    seen: list[dict[str, float]] = []
    settings = replace(QUICK, steps=25, batch_scenes=6, batch_emoji=4, learning_rate=5e-3)
    model = build_model(SMALL, len(tokenizer()))
    pretrain_vision(model, drawn_emoji(4), tokenizer(), settings, lambda step, parts: seen.append(parts))
    for name in ("shape", "colour", "centres", "cover", "pieces"):
        assert np.mean([p[name] for p in seen[-5:]]) < 0.9 * np.mean([p[name] for p in seen[:3]]), name
