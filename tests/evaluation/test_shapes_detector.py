"""The detector is right about what the world draws, and about what comes near it."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from iomm.evaluation.shapes.check import measure
from iomm.evaluation.shapes.detector import Detection, detect
from iomm.evaluation.shapes.lab import colour_name, to_lab
from iomm.evaluation.shapes.sampling import MIN_CONTRAST, contrast, draw_image
from iomm.evaluation.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, render
from tests.evaluation.shape_pictures import in_a_row, picture, thing

WHITE = 255
SIZES = (0.16, 0.21, 0.3)


def shapes_in(image_HW3: np.ndarray) -> list[str | None]:
    return [found.shape for found in detect(image_HW3).objects]


def clear_shapes(detection: Detection) -> list[str]:
    return [found.shape for found in detection.objects if found.shape and found.colour]


def test_true_renders_are_right_in_every_category():
    for category, found in measure(20, seed=3).items():
        assert (found.correct, found.exact, found.same) == (1, 1, 1), category


def test_every_shape_is_found_in_every_colour_where_it_stands():
    for k, (shape, colour) in enumerate(itertools.product(SHAPES, COLOURS)):
        background = list(BACKGROUNDS)[k % len(BACKGROUNDS)]
        one = thing(shape, colour, x=0.4, y=0.55, radius=SIZES[k % 3])
        (found,) = detect(picture(one, background=background)).objects
        assert (found.shape, found.colour) == (shape, colour), (background, found.reason)
        assert max(abs(found.x - one.x), abs(found.y - one.y)) < 0.01
        assert found.radius == pytest.approx(one.radius, rel=0.05)


def test_every_colour_can_be_told_from_most_backgrounds():
    for colour in COLOURS:
        assert sum(contrast(colour, background) >= MIN_CONTRAST for background in BACKGROUNDS) >= 4


def test_scenes_of_the_image_stream_are_read_back_whole():
    for index in range(30):
        scene = draw_image(9, index)
        found = detect(render(scene)).objects
        assert sorted((one.shape, one.colour) for one in found) == sorted(
            (one.shape, one.colour) for one in scene.things
        )


def test_larger_pictures_are_read_alike():
    scene = draw_image(4, 2)
    small, large = (
        sorted(detect(render(scene, side_px)).objects, key=lambda found: found.x) for side_px in (64, 160)
    )
    assert [(one.shape, one.colour) for one in small] == [(one.shape, one.colour) for one in large]
    assert large[0].x == pytest.approx(small[0].x, abs=0.01)


def test_a_slight_blur_is_read_and_a_strong_one_is_rejected():
    for shape in SHAPES:
        for size in (0.17, 0.3):
            sharp = picture(thing(shape, radius=size))
            assert shapes_in(ndimage.gaussian_filter(sharp, (0.8, 0.8, 0))) == [shape]
            assert clear_shapes(detect(ndimage.gaussian_filter(sharp, (3, 3, 0)))) == []


@pytest.mark.parametrize("cut", ["left", "right", "top", "bottom"])
def test_half_a_shape_is_no_shape(cut):
    half = {"left": np.s_[:, :32], "right": np.s_[:, 32:], "top": np.s_[:32], "bottom": np.s_[32:]}[cut]
    for shape in SHAPES:
        if (shape, cut) == ("triangle", "bottom"):
            continue  # its upper half is a whole, smaller triangle
        for size in SIZES:
            image = picture(thing(shape, radius=size))
            image[half] = WHITE
            assert shapes_in(image) == [None], (shape, size)


def test_three_quarters_of_a_shape_are_no_shape():
    for shape in SHAPES:
        image = picture(thing(shape, radius=0.25))
        image[32:, 32:] = WHITE
        assert clear_shapes(detect(image)) == [], shape


def test_hollow_flattened_and_tilted_shapes_are_no_shapes():
    for shape in SHAPES:
        image = picture(thing(shape, radius=0.3))
        hollow = image.copy()
        hollow[ndimage.binary_erosion(image[..., 1] < 150, iterations=3)] = WHITE
        flat = np.full_like(image, WHITE)
        flat[16:48] = image[::2]
        tilted = ndimage.rotate(image, 45, axes=(0, 1), reshape=False, order=1, cval=WHITE)
        for near in (hollow, flat, *([] if shape == "circle" else [tilted])):
            assert clear_shapes(detect(near)) == [], shape


def test_shapes_that_run_together_are_no_shapes():
    for first in SHAPES:
        for second in SHAPES:
            both = [thing(first, x=0.41, radius=0.16), thing(second, x=0.59, radius=0.16)]
            assert clear_shapes(detect(picture(*both))) == [], (first, second)


def test_a_shape_of_two_colours_has_no_colour():
    for shape in SHAPES:
        image, other = (picture(thing(shape, colour, radius=0.3)) for colour in ("red", "blue"))
        image[32:] = other[32:]
        assert clear_shapes(detect(image)) == []


def test_a_colour_between_two_has_no_name_and_a_shade_of_one_has():
    palette = np.array(list(COLOURS.values()), dtype=np.uint8)
    for name, colour in zip(COLOURS, palette, strict=True):
        assert colour_name(to_lab(colour)) == name
        shade = (0.9 * colour.astype(float) + 12).astype(np.uint8)
        assert colour_name(to_lab(shade)) == name
    lab = dict(zip(COLOURS, to_lab(palette), strict=True))
    for a, b in (("red", "orange"), ("orange", "yellow"), ("blue", "purple"), ("purple", "pink")):
        assert colour_name((lab[a] + lab[b]) / 2) is None


def test_noise_clouds_and_a_striped_ground_hold_nothing():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        cloud = np.kron(noise[:8, :8], np.ones((8, 8, 1))).astype(np.uint8)
        framed = np.full_like(noise, WHITE)
        framed[16:48, 16:48] = noise[16:48, 16:48]
        stripes = picture(thing("circle", radius=0.3))
        stripes[::4] = 120
        for image in (noise, cloud, framed, stripes):
            assert clear_shapes(detect(image)) == []


def test_specks_are_no_things_but_many_are_noted():
    image = picture(thing("star", radius=0.25))
    image[5:7, 5:7] = 0
    assert shapes_in(image) == ["star"] and detect(image).reason is None
    image[5:8, 5:60:6] = 0
    image[5:8, 6:60:6] = 0
    assert str(detect(image).reason).startswith("specks cover")


def test_shapes_at_the_border_are_read_only_if_they_are_whole():
    cut = picture(thing("circle", x=0.95, radius=0.25))
    assert clear_shapes(detect(cut)) == []


def test_an_empty_picture_holds_nothing_and_has_a_background():
    detection = detect(picture(background="sky"))
    assert detection.objects == () and detection.background == BACKGROUNDS["sky"]


def test_the_surest_thing_comes_first():
    clean, rough = in_a_row(("circle", "red"), ("circle", "blue"))
    image = picture(clean, rough)
    image[26:29, 38:42] = WHITE
    confidences = [found.confidence for found in detect(image).objects]
    assert confidences == sorted(confidences, reverse=True)
    assert detect(image).objects[0].colour == "red"


def test_pictures_of_another_form_are_refused():
    for image in (np.zeros((64, 32, 3), np.uint8), np.zeros((16, 16, 3), np.uint8), np.zeros((64, 64, 3))):
        with pytest.raises(ValueError, match="the detector takes uint8 RGB"):
            detect(image)
    with pytest.raises(ValueError, match="Ask for at least 1"):
        measure(0)
