"""Instructions, what they make of a scene, and the exact score of an edit."""

import dataclasses

import numpy as np
import pytest

from iomm.evaluation.shapes.detector import detect
from iomm.evaluation.shapes.edit_score import EditVerdict, judge_edit, score_edits
from iomm.evaluation.shapes.edits import ACTIONS, Edit, apply, draw_edit, expect, parse
from iomm.evaluation.shapes.sampling import generator
from iomm.evaluation.shapes.scene import Scene, Thing, render
from tests.evaluation.shape_pictures import in_a_row, thing

CASES = [draw_edit(0, index) for index in range(40)]
STAR, CIRCLE = in_a_row(("star", "red"), ("circle", "blue"))
BOTH = Scene(things=(STAR, CIRCLE), background="white")


def verdict(text: str, *things: Thing, source: Scene = BOTH, background: str = "white") -> EditVerdict:
    image = render(Scene(things=things, background=background))
    return judge_edit(expect(source, parse(text)), detect(image))


def test_targets_score_one_and_unedited_sources_none():
    targets = score_edits(np.stack([render(case.target) for case in CASES]), CASES)
    assert list(targets.actions) == list(ACTIONS)
    assert (targets.overall.mean, targets.overall.low) == (1, 1)
    sources = score_edits(np.stack([render(case.source) for case in CASES]), CASES)
    assert (sources.overall.mean, sources.reached.mean, sources.kept.mean) == (0, 0, 1)


def test_another_edits_target_scores_nothing():
    images = np.stack([render(case.target) for case in CASES[5:] + CASES[:5]])
    assert score_edits(images, CASES).overall.mean == 0


def test_a_text_says_its_edit_in_every_wording():
    for case in CASES:
        assert all(parse(text) == case.edit for text in case.edit.texts())
        assert case.text in case.edit.texts()
    assert parse("add an orange cross") == Edit(action="add", subject=("cross", "orange"))
    assert parse("change the number of red crosses to three").subject == ("cross", "red")


def test_an_unknown_text_and_a_scene_that_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="'paint it black' is none that a scene can follow"):
        parse("paint it black")
    for text in ("remove the pink heart", "move the red star above the pink heart"):
        with pytest.raises(ValueError, match="it has to show one pink heart"):
            expect(BOTH, parse(text))
    with pytest.raises(ValueError, match="it has to show red stars and nothing else"):
        expect(BOTH, parse("change the number of red stars to two"))


def test_recolour_wants_the_named_thing_in_place_in_the_new_colour():
    text = "make the red star green"
    assert verdict(text, dataclasses.replace(STAR, colour="green"), CIRCLE).correct
    wrong = verdict(text, STAR, dataclasses.replace(CIRCLE, colour="green"))
    assert not wrong.reached and not wrong.kept
    moved = verdict(text, dataclasses.replace(STAR, colour="green", y=0.75), CIRCLE)
    assert not moved.reached and moved.kept


def test_add_wants_the_new_thing_and_the_old_ones_as_they_were():
    new = thing("heart", "pink", x=0.5, y=0.8, radius=0.13)
    assert verdict("add a pink heart", STAR, CIRCLE, new).correct
    assert not verdict("add a pink heart", STAR, CIRCLE).reached
    instead = verdict("add a pink heart", STAR, new)
    assert instead.reached and not instead.kept and "the blue circle is not as it was" in instead.reason
    more = verdict("add a pink heart", STAR, CIRCLE, new, dataclasses.replace(new, y=0.2))
    assert not more.reached and "pink heart was not asked for" in more.reason


def test_remove_wants_the_named_thing_gone_and_only_that():
    assert verdict("remove the red star", CIRCLE).correct
    assert not verdict("remove the red star", STAR).correct
    nothing = verdict("remove the red star")
    assert nothing.reached and not nothing.kept


def test_move_wants_the_relation_and_the_other_thing_where_it_was():
    text = "move the red star to the right of the blue circle"
    source = Scene(things=(STAR, dataclasses.replace(CIRCLE, x=0.5)), background="white")
    goal = source.things[1]
    moved = dataclasses.replace(STAR, x=0.82)
    assert verdict(text, moved, goal, source=source).correct
    assert not verdict(text, *source.things, source=source).reached
    swapped = verdict(
        text, dataclasses.replace(STAR, x=0.75), dataclasses.replace(goal, x=0.3), source=source
    )
    assert not swapped.kept
    grown = verdict(text, dataclasses.replace(moved, radius=0.1), goal, source=source)
    assert not grown.kept and "another size" in grown.reason


def test_count_wants_the_number_with_those_that_stay_where_they_were():
    first, second, third = in_a_row(*[("square", "green")] * 3, radius=0.12)
    two = Scene(things=(first, third), background="white")
    more, fewer = "change the number of green squares to three", "change the number of green squares to one"
    assert verdict(more, first, second, third, source=two).correct
    assert verdict(fewer, third, source=two).correct
    assert not verdict(fewer, second, source=two).kept
    assert not verdict(fewer, source=two).reached
    assert not verdict(more, first, third, source=two).reached
    assert not verdict(more, first, dataclasses.replace(second, colour="red"), third, source=two).reached


def test_another_background_and_shifted_or_grown_things_are_not_kept():
    text = "remove the red star"
    changed = verdict(text, CIRCLE, background="sky")
    assert changed.reached and not changed.kept and changed.reason == "the background is another"
    assert not verdict(text, dataclasses.replace(CIRCLE, y=0.57)).kept
    assert not verdict(text, dataclasses.replace(CIRCLE, radius=0.2)).kept
    assert verdict(text, dataclasses.replace(CIRCLE, x=CIRCLE.x + 0.02, radius=0.16)).correct


def test_an_edit_without_room_or_contrast_has_no_target():
    rng = generator(0, 0, 0)
    full = Scene(things=(thing("square", radius=0.45),), background="white")
    assert apply(full, parse("add a blue circle"), rng) is None
    pale = Scene(things=(STAR,), background="grey")
    assert apply(pale, parse("make the red star pink"), rng) is None
    assert apply(BOTH, parse("remove the red star"), rng) == Scene(things=(CIRCLE,), background="white")


def test_as_many_pictures_as_edits_are_asked_for():
    for cases in (CASES[:2], []):
        with pytest.raises(ValueError, match="give one picture of each, and at least one"):
            score_edits(np.zeros((1, 64, 64, 3), np.uint8), cases)
