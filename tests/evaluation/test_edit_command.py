"""`iomm edit`, from the command line to the sheet."""

import pytest
from PIL import Image

from iomm.cli import main
from tests.random_run import save_random_run
from tests.small_run import draw_png, small_config


@pytest.fixture(scope="module")
def run(world, mesh, tmp_path_factory):
    return save_random_run(small_config(world, tmp_path_factory.mktemp("edit")))


def test_an_image_is_edited_as_each_instruction_says(run, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(draw_png(1, (50, 40)))

    def sheet(*arguments: str) -> Image.Image:
        options = ["--steps", "1", "-o", str(tmp_path / "sheet.png")]
        assert main(["edit", str(run), str(image), *arguments, *options]) == 0
        with Image.open(tmp_path / "sheet.png") as found:
            return found.copy()

    both = sheet("make it red", "remove the ball")
    assert 128 * 3 < both.width < 128 * 4
    assert both.tobytes() != sheet("make it red", "remove the ball", "--text-guidance", "9").tobytes()
    assert both.tobytes() != sheet("make it red", "remove the ball", "--aux-prompt").tobytes()


def test_what_cannot_be_done_is_one_line(run, tmp_path, capsys):
    image = tmp_path / "image.png"
    assert main(["edit", str(run), str(image), "make it red", "--mask-ratio", "2"]) == 1
    assert capsys.readouterr().err == "iomm: error: --mask-ratio 2.0 must lie in [0, 1].\n"
    image.write_bytes(b"no image")
    assert main(["edit", str(run), str(image), "make it red"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
