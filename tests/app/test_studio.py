"""What the page does with a checkpoint, without the page."""

import pytest
import torch

from iomm.app import command
from iomm.app.studio import SHOWN_PX, Sampling, Studio, shown
from iomm.checkpoint.generator import open_generator
from iomm.cli import main
from iomm.conditioning.mask import keep_tokens
from iomm.sampling import paint, reconstruct
from tests.random_run import save_random_run
from tests.small_run import draw_png, small_config
from tests.tiny_models import MLLMS

TWO_STEPS = Sampling(seed=3, steps=2)


@pytest.fixture(scope="module")
def studio(world, mesh, tmp_path_factory):
    run = save_random_run(small_config(world, tmp_path_factory.mktemp("studio")))
    _, encoders, system = open_generator(run, ema=True)
    return Studio(system, encoders)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(draw_png(1, (50, 40)))
    return path


def test_the_last_preview_is_the_picture_of_the_command_line(studio, image):
    *early, last = studio.paint("red ball", 2.0, TWO_STEPS)
    wanted = paint(studio.system, studio.encoders, ["red ball"], seed=3, steps=2, guidance=2.0)
    assert last.image == shown(wanted) and (last.step, last.steps) == (2, 2)
    assert [preview.step for preview in early] == [1] and early[0].image != last.image
    assert early[0].number == last.number
    hidden = studio.draw_mask(0.5, seed=3)
    *_, last = studio.reconstruct(image, hidden, 1.0, TWO_STEPS)
    keep_1N = keep_tokens(3, torch.tensor([0]), len(hidden), 0.5)
    rebuilt = reconstruct(studio.system, studio.encoders, studio.open(image), keep_1N, seed=3, steps=2)
    assert last.image == shown(rebuilt)


def test_a_long_trajectory_shows_about_eight_previews(studio):
    previews = list(studio.paint("red ball", 1.0, Sampling(seed=0, steps=50)))
    assert [preview.step for preview in previews] == [6, 12, 18, 24, 30, 36, 42, 48, 50]


def test_the_mask_and_the_instruction_count(studio, image):
    def last(*arguments):
        *_, preview = studio.edit(image, *arguments, TWO_STEPS)
        return preview.image

    as_it_is = last("make it red", "0011", 1.5, 3.0)
    assert as_it_is != last("make it red", "1100", 1.5, 3.0)
    assert as_it_is != last("remove the ball", "0011", 1.5, 3.0)


@pytest.mark.parametrize("hidden", ["", "01", "01x0", "00000"])
def test_a_mask_of_other_tokens_is_refused(studio, image, hidden):
    with pytest.raises(ValueError, match="an image has 4 patch tokens here"):
        studio.reconstruct(image, hidden, 1.0, TWO_STEPS)


def test_what_is_no_image_is_refused(studio, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="not a JPEG|cannot|unknown"):
        studio.reconstruct(tmp_path / "text.png", "0000", 1.0, TWO_STEPS)


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    assert shown(torch.zeros(1, 3, 100, 100, dtype=torch.uint8)).size == (500, 500)
    assert shown(torch.zeros(1, 3, 768, SHOWN_PX, dtype=torch.uint8)).size == (SHOWN_PX, 768)


def test_a_page_without_gradio_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["app", "nowhere"]) == 1
    assert "pip install 'iomm[app]'" in capsys.readouterr().err


@pytest.mark.parametrize("mllm", MLLMS)
def test_tokens_lie_row_by_row_over_the_image(tmp_path, mllm):
    """What the mask grid takes for granted: token i sees most of cell i."""
    from iomm.conditioning.mllm import open_mllm
    from iomm.config import MllmConfig

    MLLMS[mllm](tmp_path / "mllm")
    opened = open_mllm(MllmConfig(path=str(tmp_path / "mllm")), torch.float32, torch.device("cpu"))
    side = round(opened.image_tokens**0.5)
    blank_1CHW = torch.full((1, 3, opened.image_px, opened.image_px), 128, dtype=torch.uint8)
    cell_px = opened.image_px // side
    for i in range(opened.image_tokens):
        row, column = divmod(i, side)
        changed_1CHW = blank_1CHW.clone()
        changed_1CHW[..., row * cell_px : (row + 1) * cell_px, column * cell_px : (column + 1) * cell_px] = (
            255
        )
        moved_N = (opened.vision(changed_1CHW) - opened.vision(blank_1CHW)).norm(dim=-1)[0]
        assert moved_N.argmax() == i
