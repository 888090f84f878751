"""The drawn scenes say what they show."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.tiny.shape_scenes import (
    COLOURS,
    NUMBERS,
    Scene,
    draw_scene,
    is_heldout,
    noun_phrase,
    sample_scene,
)

SIDE_PX = 128
COUNT = {"a": 1, "an": 1} | {word: number for number, word in NUMBERS.items()}


def blobs(image: Image.Image, colour: str) -> list[tuple[float, float]]:
    """Centres, in pixels, of the connected regions of a colour."""
    near = np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(axis=2) < 8
    canvas = Image.fromarray((near * 255).astype(np.uint8)).copy()
    centres = []
    while (np.asarray(canvas) == 255).any():
        y, x = np.argwhere(np.asarray(canvas) == 255)[0]
        ImageDraw.floodfill(canvas, (int(x), int(y)), 128)
        ys, xs = np.nonzero(np.asarray(canvas) == 128)
        if len(xs) >= 12:  # a star's tip may come loose by a pixel
            centres.append((float(xs.mean()), float(ys.mean())))
        canvas = canvas.point(lambda v: 0 if v == 128 else v)
    return centres


def scenes(count: int, heldout: bool = False) -> list[Scene]:
    return [sample_scene(np.random.default_rng([3, i]), heldout) for i in range(count)]


def test_pictures_show_as_many_things_of_each_colour_as_the_caption_says() -> None:
    for scene in scenes(60):
        said: dict[str, int] = {}
        for number, colour in re.findall(r"\b(an?|two|three|four) (\w+) (?!background)", scene.sentence):
            if colour in COLOURS:
                said[colour] = said.get(colour, 0) + COUNT[number]
        image = draw_scene(scene, SIDE_PX)
        assert said, scene.caption
        assert {c: len(blobs(image, c)) for c in said} == said, scene.caption


def test_related_things_stand_as_the_caption_says() -> None:
    checked = 0
    for scene in scenes(200):
        found = re.search(r"(left of|right of|above|below)", scene.sentence)
        colours = [thing.colour for thing in scene.things]
        if found is None or colours[0] == colours[1]:
            continue
        image = draw_scene(scene, SIDE_PX)
        (x1, y1), (x2, y2) = (blobs(image, colour)[0] for colour in colours)
        assert {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}[found.group()]
        checked += 1
    assert checked > 20


def test_a_named_background_fills_the_picture_and_white_goes_unsaid() -> None:
    for scene in scenes(40):
        corner = draw_scene(scene, SIDE_PX).getpixel((0, 0))
        assert ("background" in scene.caption) == (scene.background is not None)
        assert corner == (COLOURS[scene.background] if scene.background else (255, 255, 255))


def test_training_and_heldout_captions_never_meet() -> None:
    train, heldout = scenes(200), scenes(50, heldout=True)
    assert not any(is_heldout(scene.sentence) for scene in train)
    assert all(is_heldout(scene.sentence) for scene in heldout)


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = scenes(1)[0], scenes(1)[0]
    assert first == second
    assert draw_scene(first).tobytes() == draw_scene(second).tobytes()


def test_a_count_without_a_number_word_is_refused() -> None:
    with pytest.raises(ValueError, match="count 9 has no number word"):
        noun_phrase("red", "circle", 9)
