"""The HTML report: what it shows, that it needs nothing from outside, and what it says of what is missing."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iomm.evaluation.figures import smooth
from iomm.evaluation.report import build_report, number

VOID = {"meta", "img", "source", "br", "link"}
TIMES = [0.0625 + i / 8 for i in range(8)]


def train(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": 1.5 * math.exp(-step / 300) + 0.4,
        "grad_norm": 2.0 / (1 + step / 100),
        "lr": 1e-4,
        "images_per_s": 80.0,
        "tflops": {"generator": 0.05, "mllm": 0.02, "vit": 0.01, "vae": 0.004},
        "step_ms": 400.0,
        "skipped": 0,
        **changes,
    }


def evaluation(step: int, *, alarm: bool = False) -> dict[str, Any]:
    loss = {"image": 0.6, "text": 0.7, "null": 0.8}
    return {
        "kind": "eval",
        "step": step,
        "velocity_loss": loss,
        "by_timestep": {name: [value + t * t for t in TIMES] for name, value in loss.items()},
        "timesteps": TIMES,
        "copying": {"psnr_null_db": 9.5, "psnr_image_db": 17.25, "alarm": alarm},
    }


def write_run(folder: Path, records: list[dict[str, Any]], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train_config = {"steps": 1000, "init_from": None}
    run = {
        "name": "tiny_stage1",
        "config": {"name": "tiny_stage1", "train": train_config, "optimizer": {"lr": 1e-4}},
        "git": "0123abc",
        "started": "2026-01-02T03:04:05+00:00",
        "device": "cpu, 2 threads",
        "versions": {"torch": "2.14.1"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, text in files.items():
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def write_grid(folder: Path, step: int, kind: str, side_px: int = 32) -> Path:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    path = folder / "samples" / f"step_{step:06d}_{kind}.png"
    pixels = np.random.default_rng(step).integers(0, 255, (side_px, side_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


class Page(HTMLParser):
    """Checks that tags are balanced; collects addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f" {data}"


def report_of(folder: Path) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8"))


def test_a_full_run_shows_every_section_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    records = [*(train(s) for s in range(10, 510, 10)), evaluation(250), evaluation(500)]
    bad = {"shard": "a.tar", "key": "k7", "reason": "truncated JPEG"}
    run = write_run(tmp_path, records, quarantine=json.dumps(bad))
    write_grid(run, 500, "text")
    write_grid(run, 500, "reconstruction")
    page = report_of(run)
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    assert sum(a.startswith("data:image/png") for a in page.addresses) == 2
    assert sum(a.startswith("data:image/svg") for a in page.addresses) == 2 * 6
    for phrase in (
        "500 of 1,000",
        "12.5 % below the null condition",
        "17.25 dB",
        "truncated JPEG",
        "0123abc",
        "optimizer.lr",
        "Step 500",
        "whole system",
        "No alarm.",
    ):
        assert phrase in page.text


def test_an_empty_run_says_of_every_part_that_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page = report_of(tmp_path)
    assert not any(a.startswith("data:") for a in page.addresses)
    for phrase in (
        "No step was logged.",
        "No training step was logged.",
        "No held-out evaluation was logged.",
        "The copying check was not logged.",
        "Not measured. A run with held-out samples measures it at its end",
        "No benchmark was scored.",
        "No grid of pictures was written.",
        "run.json is missing",
        "Throughput by part was not logged.",
        "The configuration was not recorded.",
    ):
        assert phrase in page.text


def test_alarms_stand_at_the_top(tmp_path: Path) -> None:
    worse = evaluation(10, alarm=True)
    worse["velocity_loss"]["text"] = 0.9
    skip = {"kind": "event", "step": 10, "event": "nan_skip", "detail": {"loss": "nan", "keys": ["k1", "k2"]}}
    resumed = {"kind": "event", "step": 5, "event": "resume"}
    page = report_of(write_run(tmp_path, [train(10), worse, skip, resumed, train(10), worse, skip]))
    curves = page.text.index("Held-out velocity loss")
    for phrase in ("Copying alarm", "The text condition does not help", "that was not finite: 1."):
        assert page.text.index(phrase) < curves
    assert "nan_skip loss nan, keys k1, k2" in page.text


def test_parts_whose_outputs_are_cached_count_nothing(tmp_path: Path) -> None:
    cached = {"generator": 0.05, "mllm": 0.02, "vit": 0, "vae": 0}
    page = report_of(write_run(tmp_path, [train(s, tflops=cached) for s in (1, 2)]))
    assert "vit 0 0.0 %" in page.text
    nothing = [train(s, tflops=dict.fromkeys(cached, 0)) for s in (1, 2)]
    assert "Throughput by part was not logged" in report_of(write_run(tmp_path / "none", nothing)).text


def test_losses_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    bad = [train(1, loss=math.nan, grad_norm=math.inf), train(2, loss=None)]
    page = report_of(write_run(tmp_path, [*bad, train(3, loss=0.5)]))
    assert "training loss 0.5 mean of the last 1 logged" in page.text


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    assert "1 of 1,000" in report_of(write_run(tmp_path, [train(1)])).text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path, [train(1), train(2), evaluation(2)])
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first
    assert not (run / "report.html.part").exists()


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    row = json.dumps({"shard": "a.tar", "key": "<script>x</script>", "reason": "a & b"})
    html = build_report(write_run(tmp_path, [train(1)], quarantine=row + "\n")).read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;x" in html


def test_many_grids_are_thinned_out_to_both_ends_and_evenly_between(tmp_path: Path) -> None:
    run = write_run(tmp_path, [train(1)])
    for step in range(100, 2600, 100):
        write_grid(run, step, "text")
    page = report_of(run)
    shown = [int(s.replace(",", "")) for s in re.findall(r"Step ([\d,]+)", page.text)]
    assert shown[0] == 2500
    assert shown[-1] == 100
    assert len(shown) == 10
    assert "15 more steps have grids" in page.text


def test_a_large_grid_is_shrunk_for_the_page_and_a_torn_one_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [train(1)])
    write_grid(run, 100, "text", side_px=1700)
    torn = write_grid(run, 200, "text")
    torn.write_bytes(torn.read_bytes()[:500])
    page = report_of(run)
    assert "shrunk for this page" in page.text
    assert any(a.startswith("data:image/webp") for a in page.addresses)
    assert "samples/step_000200_text.png is not a whole picture" in page.text


def test_a_folder_that_is_no_run_is_refused_and_names_the_runs_in_it(tmp_path: Path) -> None:
    write_run(tmp_path / "tiny_stage1", [train(1)])
    with pytest.raises(ValueError, match="Name one of the runs in it: tiny_stage1"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        build_report(tmp_path / "nowhere")


def test_the_running_mean_is_the_mean_of_finite_neighbours() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0, math.nan, math.nan, math.nan])
    np.testing.assert_allclose(smooth(values, 3), [1.0, 2.0, 4.0, 4.0, 5.0, math.nan, math.nan])
    np.testing.assert_array_equal(smooth(values, 1), values)


def test_a_long_run_is_thinned_out_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, [train(s) for s in range(5000)])
    html = build_report(run).read_text()
    light = base64.b64decode(re.findall(r'img src="data:image/svg\+xml;base64,([^"]+)"', html)[0]).decode()
    assert "logged, one in 3 shown" in light
    assert len(light) < 150_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not logged"), (0.123456, "0.1235"), (12345.6, "12,346"), (1000, "1,000"), (math.nan, "nan")],
)
def test_numbers_have_four_digits_and_grouped_thousands(value: Any, text: str) -> None:
    assert number(value) == text
