"""Verdicts by GenEval's rule, and the score."""

import json

import numpy as np
import pytest

from iomm.evaluation.bootstrap import interval_of_means
from iomm.evaluation.shapes.detector import detect
from iomm.evaluation.shapes.judge import Verdict, judge, score, write_verdicts
from iomm.evaluation.shapes.prompts import CATEGORIES, Category, Facts, Prompt, Wanted, benchmark
from iomm.evaluation.shapes.relations import Relation
from iomm.evaluation.shapes.sampling import generator, scene_of
from iomm.evaluation.shapes.scene import Thing, render
from tests.evaluation.shape_pictures import in_a_row, picture, thing

RED_STAR, BLUE_CIRCLE = in_a_row(("star", "red"), ("circle", "blue"))


def facts(category: Category, *wanted: Wanted, relation: Relation | None = None) -> Facts:
    return Facts(category=category, wanted=wanted, relation=relation)


def verdict(asked: Facts, *things: Thing) -> Verdict:
    return judge(asked, detect(picture(*things)))


def test_one_thing_more_does_not_matter_to_geneval_but_the_picture_is_not_exact():
    asked = facts("single_object", Wanted(shape="star"))
    found = verdict(asked, RED_STAR, BLUE_CIRCLE)
    assert found.correct and not found.exact and found.reason == "1 things more than asked for"
    alone = verdict(asked, RED_STAR)
    assert alone.correct and alone.exact and alone.reason == ""


def test_a_missing_shape_is_wrong():
    found = verdict(facts("two_object", Wanted(shape="star"), Wanted(shape="heart")), RED_STAR, BLUE_CIRCLE)
    assert not found.correct and found.reason == "expected a heart, found 0 of heart"


def test_counting_is_exact_both_ways():
    three = in_a_row(*[("cross", "green")] * 3, radius=0.12)
    for count in (2, 3, 4):
        asked = facts("counting", Wanted(shape="cross", count=count))
        assert verdict(asked, *three).correct == (count == 3)
    assert "found 3 of cross" in verdict(facts("counting", Wanted(shape="cross", count=2)), *three).reason


def test_counting_fails_if_anything_is_unclear_and_other_categories_do_not():
    image = picture(*in_a_row(*[("circle", "green")] * 3, radius=0.12))
    image[:, :13] = 255  # half of the first
    two = judge(facts("counting", Wanted(shape="circle", count=2)), detect(image))
    assert not two.correct and "unclear: no shape" in two.reason
    assert judge(facts("single_object", Wanted(shape="circle")), detect(image)).correct


def test_colours_are_those_of_the_named_shape():
    def asked(star: str, circle: str) -> Facts:
        both = (Wanted(shape="star", colour=star), Wanted(shape="circle", colour=circle))
        return facts("color_attr", *both)

    assert verdict(asked("red", "blue"), RED_STAR, BLUE_CIRCLE).correct
    swapped = verdict(asked("blue", "red"), RED_STAR, BLUE_CIRCLE)
    assert not swapped.correct and "expected a blue star, found red" in swapped.reason
    assert not verdict(facts("colors", Wanted(shape="star", colour="pink")), RED_STAR).correct


def test_a_colour_without_a_name_is_wrong():
    image = picture(RED_STAR)
    red, orange = np.array((221, 40, 40)), np.array((245, 135, 25))
    image[(image == red).all(-1)] = (red + orange) // 2
    found = judge(facts("colors", Wanted(shape="star", colour="red")), detect(image))
    assert not found.correct and "found unnamed" in found.reason


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_position_holds_in_one_direction_only(relation):
    asked = facts("position", Wanted(shape="star"), Wanted(shape="circle"), relation=relation)
    found = verdict(asked, RED_STAR, BLUE_CIRCLE)
    assert found.correct == (relation == "left of")
    assert found.correct or "found left of" in found.reason


def test_things_right_on_top_of_each_others_line_stand_nowhere():
    asked = facts("position", Wanted(shape="star"), Wanted(shape="circle"), relation="left of")
    above = [thing("star", y=0.25, radius=0.17), thing("circle", "blue", y=0.75, radius=0.17)]
    assert verdict(asked, *above).reason == "expected star left of circle, found above"


def test_a_picture_without_a_background_is_wrong_with_the_reason():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = judge(facts("single_object", Wanted(shape="star")), detect(noise))
    assert not found.correct and "of the rim is background" in found.reason


def painted(prompts: list[Prompt], images: int = 1) -> np.ndarray:
    return np.stack(
        [
            render(scene_of(p.facts, generator(8, 9, n * images + i)))
            for n, p in enumerate(prompts)
            for i in range(images)
        ]
    )


def test_a_benchmark_painted_as_asked_scores_one_in_all_splits(tmp_path):
    prompts = benchmark(3)
    found = score(painted(prompts), prompts)
    assert list(found.splits) == ["seen", "heldout_kind", "heldout_relation"]
    for split in found.splits.values():
        assert (split.overall.mean, split.overall.low, split.exact.mean) == (1, 1, 1)
    write_verdicts(found, tmp_path / "verdicts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(lines) == len(prompts)
    assert lines[4]["prompt"] == prompts[4].text and lines[4]["correct"] is True and lines[4]["reason"] == ""
    assert lines[4]["detection"]["objects"][0]["shape"] in lines[4]["prompt"]
    assert json.loads(json.dumps(found.to_dict()))["splits"]["seen"]["overall"]["mean"] == 1


def test_the_overall_score_is_the_mean_of_the_categories_and_not_of_the_pictures():
    prompts = [prompt for prompt in benchmark(4) if prompt.split == "seen"]
    few = [p for p in prompts if p.facts.category != "counting"] + [
        p for p in prompts if p.facts.category == "counting"
    ][:1]
    images = painted(few)
    images[[p.facts.category == "colors" for p in few]] = 255
    found = score(images, few).splits["seen"]
    assert found.overall.mean == pytest.approx(5 / 6)
    assert list(found.categories) == list(CATEGORIES)
    assert {c: i.mean for c, i in found.categories.items()} == {c: float(c != "colors") for c in CATEGORIES}


def test_images_of_a_prompt_follow_each_other_and_count_together():
    prompts = [prompt for prompt in benchmark(2) if prompt.facts.category == "single_object"]
    images = painted(prompts, images=2)
    images[1] = 255
    found = score(images, prompts)
    assert found.images_per_prompt == 2
    assert [verdict.correct for verdict in found.verdicts] == [True, False, True, True]
    assert [(line["number"], line["image"]) for line in found.lines()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found.splits["seen"].overall.mean == 0.75


def test_missing_pictures_are_refused():
    prompts = benchmark(1)
    for images in (np.zeros((0, 64, 64, 3), np.uint8), np.zeros((len(prompts) + 1, 64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="every prompt needs the same number of pictures"):
            score(images, prompts)


def test_intervals_are_a_function_of_the_seed_and_shrink_with_more_prompts():
    rng = np.random.default_rng(0)
    few, many = (rng.uniform(size=n) < 0.7 for n in (40, 1000))
    narrow, wide = (interval_of_means([group.astype(float)]) for group in (many, few))
    assert wide == interval_of_means([few.astype(float)]) != interval_of_means([few.astype(float)], seed=1)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert narrow.low < 0.7 < narrow.high
    error = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert (narrow.high - narrow.low) / 2 == pytest.approx(error, rel=0.15)


def test_groups_weigh_alike_whatever_their_size():
    found = interval_of_means([np.ones(100), np.zeros(1)])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one prompt in every group"):
        interval_of_means([np.ones(2), np.ones(0)])
