"""The demo's machinery on the shipped images and models, with a few steps in place of its thousands."""

import json
from pathlib import Path

import pytest
from PIL import Image

from iomm import demo
from tests.small_run import losses


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert demo.run_demo(folder, fraction=0.004) == 0
    return folder


def test_both_stages_train_and_the_second_starts_from_the_first(out):
    first, second = demo.demo_configs(out, 0.004)
    assert len(losses(first.run_dir)) >= 1 and len(losses(second.run_dir)) >= 1
    assert second.train.init_from == str(first.run_dir)
    assert first.data.mix_ratio == 1.0 and second.data.mix_ratio == 0.75


def test_it_paints_24_prompts_and_writes_two_self_contained_reports(out):
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 600 and sheet.height > 400
    for stage in ("stage1", "stage2"):
        assert "data:image/png;base64" in (out / stage / "report.html").read_text()


def test_the_last_evaluation_compares_three_conditions(out):
    lines = (out / "stage2" / "metrics.jsonl").read_text().splitlines()
    evaluation = next(record for line in lines if (record := json.loads(line))["kind"] == "eval")
    assert evaluation["velocity_loss"].keys() == {"image", "text", "null"}


def test_the_configs_in_examples_build(out):
    from iomm.cli import load_config

    files = sorted((Path(demo.__file__).parents[1] / "examples" / "configs").glob("*.py"))
    assert len(files) >= 5
    for file in files:
        assert load_config(file).run_dir


def test_a_fraction_outside_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--fraction 2 must lie in \(0, 1\]"):
        demo.demo_configs(tmp_path, 2)
