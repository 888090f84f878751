"""The page in a headless Chromium: what a user sees who types, clicks, uploads and paints."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.random_run import save_random_run
from tests.small_run import draw_png, small_config

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address(world, mesh, tmp_path_factory) -> Iterator[str]:
    """`iomm app` of random weights, in its own process, which takes the uploads with it when it ends."""
    folder = tmp_path_factory.mktemp("page")
    run = save_random_run(small_config(world, folder))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-W", "ignore", "-m", "iomm.cli", "app", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"(http://127\.0\.0\.1:\d+)/? \(Ctrl-C ends it\)", line):
                (uploads,) = folder.glob("iomm-app-*")
                assert uploads.stat().st_mode & 0o777 == 0o700
                yield found[1]
                process.terminate()
                process.communicate()
                assert process.returncode == 143 and not uploads.exists()
                return
        pytest.fail("".join(said))


@pytest.fixture(scope="module")
def page(address) -> Iterator[Any]:
    """The open page. Whatever it asks of any other host fails the test that is running."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(30_000)
        page.elsewhere, page.begun = [], 0

        def look(request: Any) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                page.elsewhere.append(request.url)

        page.on("request", look)
        page.goto(address)
        yield page
        browser.close()


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(draw_png(1, (50, 40)))
    return path


def picture(page: Any, tab: str) -> bytes:
    """The bytes of the next picture, made on this tab."""
    page.begun += 1
    page.click(f"#{tab}-run")
    page.locator(f"#{tab}-status", has_text=f"picture {page.begun}: done").wait_for()
    source = page.locator(f"#{tab}-picture img").get_attribute("src")
    return page.request.get(source).body()


def set_number(page: Any, name: str, value: int) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.locator(f"#{name} input[type=number]").press("Tab")


def test_a_prompt_becomes_a_picture_that_changes_with_the_seed(page):
    page.fill("#prompt textarea", "red ball")
    set_number(page, "prompt-steps", 2)
    first = picture(page, "prompt")
    assert first.startswith(b"\x89PNG")
    assert picture(page, "prompt") == first
    set_number(page, "prompt-seed", 1)
    assert picture(page, "prompt") != first
    assert page.elsewhere == []


def test_a_port_that_is_taken_is_named(address):
    from iomm.app.page import serve

    host, port = address.removeprefix("http://").split(":")
    with pytest.raises(OSError, match=f"cannot listen on {host}:{port}.*Choose another --host or --port"):
        serve(None, host, int(port))  # pyright: ignore[reportArgumentType]


def test_a_user_watches_a_trajectory_and_stops_it(page):
    page.get_by_role("tab", name="Prompt").click()
    page.fill("#prompt textarea", "red ball")
    set_number(page, "prompt-steps", 250)
    page.begun += 1
    page.click("#prompt-run")
    page.locator("#prompt-status", has_text=re.compile(r"step \d+ of 250, as estimated so far")).wait_for()
    page.click("#prompt-stop")
    page.locator("#prompt-status", has_text="stopped").wait_for()
    set_number(page, "prompt-steps", 2)
    assert picture(page, "prompt").startswith(b"\x89PNG")


def test_a_user_who_waits_for_another_can_stop_before_it_begins(page, address):
    page.get_by_role("tab", name="Prompt").click()
    set_number(page, "prompt-steps", 250)
    page.begun += 1
    page.click("#prompt-run")
    page.locator("#prompt-status", has_text="step ").wait_for()
    other = page.context.browser.new_page()
    other.goto(address)
    other.fill("#prompt textarea", "red ball")
    other.click("#prompt-run")
    other.locator("#prompt-picture", has_text="queue").wait_for()
    other.click("#prompt-stop")
    page.click("#prompt-stop")
    other.locator("#prompt-status", has_text="stopped while it waited").wait_for()
    assert not other.locator("#prompt-picture img").count()
    other.close()
    set_number(page, "prompt-steps", 2)
    assert picture(page, "prompt").startswith(b"\x89PNG")


def test_an_uploaded_image_is_reconstructed_from_the_tokens_left_by_the_painted_mask(
    page, image, tmp_path_factory
):
    page.get_by_role("tab", name="Reconstruct").click()
    tokens, hidden = (page.locator(f"#reconstruct-grid i{which}") for which in ("", ".hidden-token"))
    set_number(page, "reconstruct-mask-ratio", 1)
    hidden.nth(3).wait_for()
    page.set_input_files("#reconstruct-upload input[type=file]", image)
    page.locator("#reconstruct-upload img").wait_for()
    assert list(tmp_path_factory.getbasetemp().glob("page*/iomm-app-*/**/image.png"))  # gone at the end
    set_number(page, "reconstruct-mask-ratio", 0)
    hidden.first.wait_for(state="detached")
    assert tokens.count() == 4
    set_number(page, "reconstruct-steps", 2)
    whole = picture(page, "reconstruct")
    tokens.nth(0).hover()
    page.mouse.down()
    tokens.nth(1).hover()
    page.mouse.up()
    assert [token.get_attribute("class") for token in tokens.all()] == ["hidden-token"] * 2 + [""] * 2
    painted = picture(page, "reconstruct")
    assert whole.startswith(b"\x89PNG") and painted != whole
    tokens.nth(0).click()
    tokens.nth(1).click()
    assert picture(page, "reconstruct") == whole
    assert page.elsewhere == []


def test_an_instruction_edits_an_image_and_what_is_missing_is_said(page, image):
    page.get_by_role("tab", name="Edit").click()
    page.click("#edit-run")
    page.get_by_text("There is no image yet. Upload one.").wait_for()
    set_number(page, "edit-mask-ratio", 0)
    page.set_input_files("#edit-upload input[type=file]", image)
    page.locator("#edit-upload img").wait_for()
    page.click("#edit-run")
    page.get_by_text("the text '' has no tokens").wait_for()
    page.fill("#edit-instruction textarea, #edit-instruction input", "make it red")
    set_number(page, "edit-steps", 2)
    red = picture(page, "edit")
    page.fill("#edit-instruction textarea, #edit-instruction input", "remove the ball")
    assert red.startswith(b"\x89PNG") and picture(page, "edit") != red
    assert page.elsewhere == []
