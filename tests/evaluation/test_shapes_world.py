"""Scenes, prompts and shards of the shapes world."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from iomm.data.shards import ShardSet
from iomm.evaluation.shapes.prompts import (
    CATEGORIES,
    HELDOUT_KINDS,
    SPLITS,
    Facts,
    Prompt,
    Wanted,
    all_facts,
    benchmark,
    is_heldout_relation,
    texts,
)
from iomm.evaluation.shapes.relations import OPPOSITE, RELATIONS, relations, thing_box
from iomm.evaluation.shapes.sampling import (
    GAP,
    MIN_CONTRAST,
    RIM,
    Stream,
    contrast,
    draw_image,
    draw_pair,
    shows_heldout,
)
from iomm.evaluation.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    SHAPES,
    coverage,
    polygon_area,
    render,
)
from iomm.evaluation.shapes.shards import SceneSource, World, make_world
from tests.evaluation.shape_pictures import picture, thing

PAIRS = [draw_pair(0, index) for index in range(240)]


def test_the_world_is_large_enough():
    assert len(SHAPES) >= 5 and len(COLOURS) == 8 and len(BACKGROUNDS) >= 3


def test_a_shape_covers_its_area_with_its_centroid_where_it_stands():
    middle = np.arange(64) + 0.5
    for shape, outline in OUTLINES.items():
        covered = coverage(shape, 30.3, 33.7, 15.0, (0, 0, 64, 64))
        assert covered.sum() == pytest.approx(polygon_area(outline) * 225, rel=0.02)
        x, y = covered.sum(0) @ middle / covered.sum(), covered.sum(1) @ middle / covered.sum()
        assert (x, y) == pytest.approx((30.3, 33.7), abs=0.1)


def test_edges_are_antialiased_and_the_inside_has_the_named_colour():
    image = picture(thing("circle", "blue", radius=0.3))
    assert tuple(image[32, 32]) == COLOURS["blue"] and tuple(image[0, 0]) == BACKGROUNDS["white"]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_scenes_and_prompts_are_functions_of_seed_and_index():
    assert draw_pair(0, 7) == PAIRS[7]
    assert draw_image(0, 7) == draw_image(0, 7)
    others = [draw_pair(1, 7), draw_pair(0, 13), draw_pair(0, 7, stream=Stream.HELDOUT)]
    assert all(other.scene != PAIRS[7].scene for other in others)
    assert benchmark(4, seed=1) == benchmark(4, seed=1) != benchmark(4, seed=2)


def test_no_scene_is_ambiguous():
    scenes = [pair.scene for pair in PAIRS] + [draw_image(0, index) for index in range(120)]
    for scene in scenes:
        assert 1 <= len(scene.things) <= 4
        for one in scene.things:
            corners = OUTLINES[one.shape] * one.radius + (one.x, one.y)
            assert corners.min() > RIM - 1e-9 and corners.max() < 1 - RIM + 1e-9
            assert contrast(one.colour, scene.background) >= MIN_CONTRAST
        for a, b in itertools.combinations(scene.things, 2):
            corners_a, corners_b = (OUTLINES[t.shape] * t.radius + (t.x, t.y) for t in (a, b))
            assert np.linalg.norm(corners_a[:, None] - corners_b[None], axis=-1).min() > GAP - 1e-9


def test_every_count_relation_background_and_group_of_mixed_things_occurs():
    images = [draw_image(0, index) for index in range(120)]
    assert {len(scene.things) for scene in images} == {1, 2, 3, 4}
    assert {scene.background for scene in images} == set(BACKGROUNDS)
    assert any(len({(t.shape, t.colour) for t in scene.things}) > 2 for scene in images)
    assert {pair.prompt.facts.relation for pair in PAIRS} == {None, *RELATIONS}


def test_captions_are_true_of_their_pictures():
    for pair in PAIRS:
        facts, things = pair.prompt.facts, pair.scene.things
        for wanted in facts.wanted:
            having = [one for one in things if one.shape == wanted.shape]
            assert len(having) == wanted.count
            assert wanted.colour is None or {one.colour for one in having} == {wanted.colour}
        if facts.relation is not None:
            assert relations(*(thing_box(one) for one in things)) == {facts.relation}
    assert [pair.prompt.facts.category for pair in PAIRS[:6]] == list(CATEGORIES)


def test_pairs_never_show_what_is_held_out_and_images_may():
    for pair in PAIRS:
        kinds = {(one.shape, one.colour) for one in pair.scene.things}
        assert not kinds & HELDOUT_KINDS
        for a, b in itertools.permutations(pair.scene.things, 2):
            for relation in relations(thing_box(a), thing_box(b)):
                assert not is_heldout_relation(a.shape, relation, b.shape), pair.prompt.text
    assert any(shows_heldout(draw_image(0, index)) for index in range(20))
    assert not any(shows_heldout(draw_image(0, index, show_heldout=False)) for index in range(60))


def test_pairs_show_every_shape_colour_and_relation_in_other_combinations():
    kinds = set(itertools.product(SHAPES, COLOURS)) - HELDOUT_KINDS
    assert {shape for shape, _ in kinds} == set(SHAPES) and {colour for _, colour in kinds} == set(COLOURS)
    for shape, relation in itertools.product(SHAPES, RELATIONS):
        others = [other for other in SHAPES if other != shape]
        held = [other for other in others if is_heldout_relation(shape, relation, other)]
        assert len(held) == 1, (shape, relation)


def test_a_relation_and_its_mirror_image_are_held_out_together():
    for a, b in itertools.permutations(SHAPES, 2):
        for relation in RELATIONS:
            assert is_heldout_relation(a, relation, b) == is_heldout_relation(b, OPPOSITE[relation], a)


def test_the_benchmark_has_as_many_different_prompts_of_each_category_and_split():
    prompts = benchmark(24)
    assert len({(prompt.split, prompt.text) for prompt in prompts}) == len(prompts) == 24 * 9
    for split, categories in SPLITS.items():
        for category in categories:
            of = [p.facts for p in prompts if (p.split, p.facts.category) == (split, category)]
            assert len(of) == 24
            counts = [of.count(facts) for facts in set(of)]
            assert max(counts) - min(counts) <= 1
    seen = {facts for category in CATEGORIES for facts in all_facts(category)}
    assert not seen & {prompt.facts for prompt in prompts if prompt.split != "seen"}


def test_a_prompt_is_a_line_of_genevals_metadata():
    facts = Facts(
        category="position", wanted=(Wanted(shape="star"), Wanted(shape="circle")), relation="above"
    )
    assert "a photo of a star above a circle" in texts(facts)
    assert Prompt(text="t", facts=facts).metadata() == {
        "tag": "position",
        "include": [
            {"class": "circle", "count": 1},
            {"class": "star", "count": 1, "position": ["above", 0]},
        ],
        "prompt": "t",
        "split": "seen",
    }
    counted = Facts(category="counting", wanted=(Wanted(shape="cross", count=3),))
    assert "three crosses" in texts(counted)
    assert Prompt(text="t", facts=counted).metadata()["exclude"] == [{"class": "cross", "count": 4}]
    coloured = Facts(category="colors", wanted=(Wanted(shape="heart", colour="orange"),))
    assert "a drawing of an orange heart" in texts(coloured)
    assert Prompt(text="t", facts=coloured).metadata()["include"][0]["color"] == "orange"


def test_more_prompts_than_there_are_and_splits_without_a_category_are_refused():
    with pytest.raises(ValueError, match="500 prompts of single_object .* there are 48 different ones"):
        benchmark(500)
    with pytest.raises(ValueError, match="counting name nothing that heldout_kind holds out"):
        all_facts("counting", "heldout_kind")


def test_relations_are_genevals_which_gives_a_diagonal_two_and_a_close_pair_none():
    middle = thing_box(thing("square", radius=0.1))
    at = {
        "left of": (0.2, 0.5),
        "right of": (0.8, 0.5),
        "above": (0.5, 0.2),
        "below": (0.5, 0.8),
    }
    for relation, (x, y) in at.items():
        assert relations(thing_box(thing("square", x=x, y=y, radius=0.1)), middle) == {relation}
    assert relations(thing_box(thing("square", x=0.8, y=0.8, radius=0.1)), middle) == {"right of", "below"}
    assert relations(thing_box(thing("square", x=0.51, radius=0.1)), middle) == set()


def test_a_world_becomes_shards_that_the_loader_reads(tmp_path):
    world = World(images=7, pairs=6, heldout=3, seed=5, side_px=32)
    indexes = make_world(world, tmp_path)
    assert list(indexes) == ["images", "pairs", "heldout"]
    sets = {name: ShardSet.open([str(index)]) for name, index in indexes.items()}
    assert {name: len(of) for name, of in sets.items()} == {"images": 7, "pairs": 6, "heldout": 3}
    assert sets["images"].caption(0) is None
    for index in range(6):
        pair = draw_pair(5, index)
        assert sets["pairs"].caption(index) == pair.prompt.text
        with Image.open(io.BytesIO(sets["pairs"].image_bytes(index))) as image:
            assert np.array_equal(np.asarray(image), render(pair.scene, 32))
    assert json.loads((tmp_path / "world.json").read_text())["images_show_heldout"] is True


def test_a_world_goes_on_where_it_was_stopped_and_refuses_another_ones_folder(tmp_path):
    first = make_world(World(images=4, pairs=2, heldout=0), tmp_path)
    assert make_world(World(images=4, pairs=2, heldout=0), tmp_path) == first
    with pytest.raises(ValueError, match="begun from other sources"):
        make_world(World(images=5, pairs=2, heldout=0), tmp_path)
    with pytest.raises(ValueError, match="none may be negative"):
        make_world(World(images=-1), tmp_path / "other")


def test_a_source_starts_anywhere_and_its_fingerprint_tells_worlds_apart():
    world = World(images=9, side_px=32)
    source = SceneSource(world=world, stream=Stream.IMAGES, count=9)
    assert [item.key for item in source.items(7)] == ["images-00000007", "images-00000008"]
    other = SceneSource(world=World(images=9, seed=1, side_px=32), stream=Stream.IMAGES, count=9)
    assert source.fingerprint() != other.fingerprint()
