"""GenEval's rules and detector path, with fake things and random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from iomm.evaluation.benches.detected import judge_geneval
from iomm.evaluation.benches.detector import _things
from iomm.evaluation.benches.generate import write_folder
from iomm.evaluation.benches.geneval import GENEVAL, read_results
from iomm.evaluation.benches.journal import Journal
from iomm.evaluation.benches.layout import BenchError, load_prompts
from iomm.evaluation.benches.rules import COLORS, Thing, kept, relations, verdict
from tests.evaluation.benches import bench_files as small


def thing(box=(0.0, 0.0, 10.0, 10.0), score=0.95):
    return Thing(box=box, score=score, mask_HW=np.ones((8, 8), bool))


def no_colors(things, name):
    raise AssertionError("no colour was asked for")


def test_a_thing_has_to_be_there_often_enough_and_not_too_often():
    clause = {
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
    }
    wanted = {1: "expected clock>=2, found 1", 2: "", 3: "expected clock<3, found 3"}
    for count, reason in wanted.items():
        assert verdict({"clock": [thing()] * count}, clause, no_colors) == (not reason, reason)
    assert verdict({}, clause, no_colors)[0] is False


def test_colours_are_asked_of_the_surest_things_only():
    clause = {"include": [{"class": "cow", "count": 1, "color": "blue"}]}
    cows = [thing(score=0.9), thing(score=0.5)]
    assert verdict({"cow": cows}, clause, lambda some, _: ["blue"] * len(some)) == (True, "")
    correct, reason = verdict({"cow": cows}, clause, lambda some, _: ["red"] * len(some))
    assert not correct and reason == "expected blue cow>=1, found 0 blue; and 1 red"


@pytest.mark.parametrize(
    ("box", "stands"),
    [
        ((0, 40, 10, 50), {"left of"}),
        ((90, 40, 100, 50), {"right of"}),
        ((40, 0, 50, 10), {"above"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((41, 40, 51, 50), set()),  # nearer than a tenth of both boxes
    ],
)
def test_positions_are_of_centres_less_a_share_of_the_boxes(box, stands):
    assert relations(box, (40, 40, 50, 50)) == stands


def test_position_needs_its_target():
    clause = {
        "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    }
    dog, cow = thing((50, 0, 60, 10)), thing()
    assert verdict({"dog": [dog], "cow": [cow]}, clause, no_colors)[0]
    assert verdict({"dog": [cow], "cow": [dog]}, clause, no_colors) == (
        False,
        "expected dog right of target, found left of target",
    )
    assert "no target for dog to be right of" in verdict({"dog": [dog]}, clause, no_colors)[1]


def test_counting_keeps_only_what_is_very_sure():
    found = {"clock": [thing(score=0.5), thing(score=0.95)], "cat": [thing(score=0.2)]}
    assert [of.score for of in kept(found, "colors")["clock"]] == [0.95, 0.5]
    assert [of.score for of in kept(found, "counting")["clock"]] == [0.95]
    assert "cat" not in kept(found, "colors")


def test_things_are_the_surest_pairs_with_boxes_around_their_masks():
    classes = torch.tensor([[8.0, 0.0, 0.0], [0.0, 0.0, 8.0]])  # a cat, and nothing
    masks = torch.full((2, 6, 8), -9.0)
    masks[0, 1:4, 2:7] = 9.0
    found = _things(classes, masks, ["cat", "dog"])
    [cat, *_] = sorted(found["cat"], key=lambda of: -of.score)
    assert cat.box == (2, 1, 7, 4) and cat.mask_HW.sum() == 15
    assert cat.score == pytest.approx(classes[0].softmax(0)[0].item() * torch.tensor(9.0).sigmoid().item())
    assert len(found["cat"]) == 1 and found["dog"][0].score < 0.01  # the empty mask is no thing


class FakeFinder:
    """Finds a bench in every picture of an even number."""

    name = "fake finder"

    def __init__(self):
        self.looked = 0

    def require(self, classes):
        if classes != {"bench"}:
            raise BenchError(f"knows no {classes}")

    def find(self, image):
        self.looked += 1
        return {"bench": [thing()]} if image.getpixel((0, 0))[1] % 2 == 0 else {}

    def colors(self, image, things, name):
        raise AssertionError("no colour was asked for")


def test_a_folder_is_judged_once_and_written_as_the_official_scorer_would(tmp_path):
    items = load_prompts(GENEVAL, small.geneval_prompts(tmp_path / "prompts.jsonl"), subset=True)
    folder, results, finder = tmp_path / "out", tmp_path / "out.results.jsonl", FakeFinder()
    write_folder(GENEVAL, items, folder, small.fake_paint(GENEVAL), small.settings(), small.one_rank())
    reading = judge_geneval(items, folder, finder, Journal(tmp_path / "a.jsonl"), results)
    assert set(reading.scores.values()) == {0.5} and reading == read_results([results])
    line = json.loads(results.read_text().splitlines()[1])
    assert list(line) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert (
        line["reason"] == "expected bench>=1, found 0" and json.loads(line["metadata"])["tag"] == line["tag"]
    )
    looked = finder.looked
    judge_geneval(items, folder, finder, Journal(tmp_path / "a.jsonl"), results)
    assert finder.looked == looked == 28


def save_tiny_judges(folder):
    """Mask2Former and CLIP with random weights, in the layouts of the real ones."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    from iomm.conditioning.random_mllm import save_letter_tokenizer

    torch.manual_seed(0)
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    stages = {"window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    mask2former = {
        "backbone_config": SwinConfig(**swin, **stages),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
        **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
        **{"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5},
        **{"id2label": {0: "bench", 1: "remote"}, "label2id": {"bench": 0, "remote": 1}},
    }
    detector, clip = folder / "mask2former", folder / "clip"
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**mask2former)).save_pretrained(detector)
    size = {"shortest_edge": 32, "longest_edge": 64}
    Mask2FormerImageProcessorPil(size=size, size_divisor=32).save_pretrained(detector)
    small_clip = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**small_clip, "vocab_size": 200, "max_position_embeddings": 64, "eos_token_id": 1}
    vision = {**small_clip, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        clip
    )
    save_letter_tokenizer(clip)
    return detector, clip


def test_detector_and_clip_come_from_local_folders(tmp_path):
    from iomm.evaluation.benches.detector import Detector

    with pytest.raises(BenchError, match="no AutoImageProcessor in"):
        Detector(tmp_path, tmp_path, torch.device("cpu"))
    finder = Detector(*save_tiny_judges(tmp_path), torch.device("cpu"))
    image = Image.effect_noise((48, 40), 90).convert("RGB")
    found = finder.find(image)
    things = [one for of in found.values() for one in of]
    assert things and found.keys() <= {"bench", "tv remote"} and all(0 <= of.score <= 1 for of in things)
    assert all(of.mask_HW.shape == (40, 48) for of in things)
    whole = Thing(box=(0, 0, 48, 40), score=1, mask_HW=np.ones((40, 48), bool))
    assert finder.colors(image, [whole, whole], "bench")[0] in COLORS
    with pytest.raises(BenchError, match="knows no zebra"):
        finder.require({"zebra", "bench"})
