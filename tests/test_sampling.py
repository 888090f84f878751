"""Pictures on their way, and zero-shot edits, from a system of random weights."""

import pytest
import torch

from iomm.checkpoint.generator import open_generator
from iomm.sampling import edit, editing, paint, painting, reconstruct, watch
from tests.random_run import save_random_run
from tests.small_run import IMAGE_PX, small_config

KEEP = torch.tensor([[True, False, True, True], [False, True, True, False]])
TEXTS = ["make it red", "remove the ball"]


@pytest.fixture(scope="module")
def opened(world, mesh, tmp_path_factory):
    """System and encoders."""
    _, encoders, system = open_generator(
        save_random_run(small_config(world, tmp_path_factory.mktemp("sampling"))), ema=True
    )
    return system, encoders


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (2, 3, IMAGE_PX, IMAGE_PX), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def edited(opened, images, texts=TEXTS, keep=KEEP, **settings):
    settings = {"seed": 3, "steps": 2, "image_guidance": 1.5, "text_guidance": 3.0} | settings
    return edit(*opened, images, texts, keep, **settings)


def test_an_edit_whose_text_does_not_count_is_the_reconstruction(opened, images):
    ours = edited(opened, images, image_guidance=1.0, text_guidance=0.0)
    assert torch.equal(ours, reconstruct(*opened, images, KEEP, seed=3, steps=2))


def test_an_edit_by_the_auxiliary_prompt_is_the_guided_reconstruction(opened, images):
    aux = opened[0].config.condition.aux_prompt
    ours = edited(opened, images, [aux, aux], image_guidance=2.0, text_guidance=2.0).int()
    rebuilt = reconstruct(*opened, images, KEEP, seed=3, steps=2, guidance=2.0).int()
    assert (ours - rebuilt).abs().max() <= 1


def test_instruction_image_mask_and_seed_all_count(opened, images):
    as_it_is = edited(opened, images)
    for other in [
        edited(opened, images, TEXTS[::-1]),
        edited(opened, images.flip(0)),
        edited(opened, images, keep=~KEEP),
        edited(opened, images, seed=4),
        edited(opened, images, aux_prompt=True),
        edited(opened, images, text_guidance=5.0),
        edited(opened, images, image_guidance=2.5),
    ]:
        assert ((other != as_it_is).flatten(1).sum(1) > 0).all()


def test_an_edit_does_not_depend_on_its_batch(opened, images):
    alone = edited(opened, images[1:], TEXTS[1:], KEEP[1:], first=1)
    assert (alone[0].int() - edited(opened, images)[1].int()).abs().max() <= 1


def test_an_edit_costs_three_evaluations_a_step_and_fewer_where_a_scale_is_one(opened, images):
    scales = [(1.5, 3.0), (1.0, 3.0), (2.0, 2.0)]
    tasks = [
        editing(*opened, images, TEXTS, KEEP, seed=0, image_guidance=image, text_guidance=text)
        for image, text in scales
    ]
    assert [task.velocity.nfe for task in tasks] == [3, 2, 2]


def test_not_one_instruction_an_image_is_refused(opened, images):
    with pytest.raises(ValueError, match="1 instructions for 2 images; give one an image"):
        edited(opened, images, TEXTS[:1])
    with pytest.raises(ValueError, match="has no tokens"):
        edited(opened, images, ["make it red", ""])


def test_watching_shows_estimates_on_the_way_and_ends_with_the_picture(opened):
    task = painting(*opened, ["red ball"], seed=5, guidance=2.0)
    seen = list(watch(*opened, task, steps=5, every=2))
    assert [step for step, _ in seen] == [2, 4, 5]
    assert torch.equal(seen[-1][1], paint(*opened, ["red ball"], seed=5, steps=5, guidance=2.0))
    assert seen[0][1].shape == (1, 3, IMAGE_PX, IMAGE_PX) and not torch.equal(seen[0][1], seen[-1][1])
