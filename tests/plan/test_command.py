"""`iomm plan` from the command line."""

import json
import runpy
from pathlib import Path

import pytest

from iomm import cli
from iomm.plan.tables import Table, to_markdown, to_text

ROOT = Path(__file__).parent.parent.parent
B = ["plan", "--preset", "b", "--gpus", "64", "--gpu", "h800"]


def test_a_preset_is_planned_with_levers_and_sources_and_written_in_both_forms(tmp_path, capsys):
    data, page = tmp_path / "plan.json", tmp_path / "plan.md"
    options = ["--levers", "--sources", "--json", str(data), "--markdown", str(page)]
    assert cli.main([*B, "--images", "110e6", "--price-per-gpu-hour", "2", *options]) == 0
    printed = capsys.readouterr().out
    for words in ("LM queries backward", "GPU-hours for 110 M images", "cost at 2", "Memory of a rank"):
        assert words in printed
    plan = json.loads(data.read_text())
    assert plan["micro_batches"] == 1 and plan["fits"] and plan["images_per_s_per_gpu"] > 1
    assert page.read_text().startswith("# Plan of iomm-b: 64 H800, 512 px, global batch 1024\n")
    assert "| + FP8 (current scaling) |" in page.read_text()


def test_options_change_what_is_planned(tmp_path):
    def rate(*options: str) -> float:
        data = tmp_path / "plan.json"
        assert cli.main([*B, "--json", str(data), *options]) == 0
        return json.loads(data.read_text())["images_per_s_per_gpu"]

    plain = rate()
    assert rate("--mask-mode", "drop") > plain
    assert rate("--cache", "vae") > plain > rate("--kernels", "eager")
    assert rate("--fp8", "current") > plain > rate("--recompute", "full")
    assert rate("--px", "1024") < plain


def test_auto_with_fixed_settings_ranks_the_rest(capsys):
    assert cli.main([*B, "--layout", "auto,tp=1,pp=1"]) == 0
    printed = capsys.readouterr().out
    assert "Layouts: the fastest" in printed and "Infeasible layouts" in printed


def test_a_configuration_file_is_planned_from_its_own_folders(capsys):
    config = str(ROOT / "examples" / "configs" / "tiny_stage1.py")
    assert cli.main(["plan", config, "--gpus", "1"]) == 0
    assert "16 image tokens, 8 condition tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "b200"], "unknown GPU 'b200'"),
        (["--gpus", "60"], "do not fill nodes of 8"),
        (["--px", "500"], "Choose --px 512"),
        (["--cache", "lm"], "cannot cache lm"),
        (["--set", "mllm.path=nobody/nothing"], "none of the published ones"),
    ],
)
def test_what_cannot_be_planned_is_an_error_in_one_line(options, message, capsys):
    assert cli.main([*B, *options]) == 1
    assert message in capsys.readouterr().err


def test_the_tool_is_the_command(capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "plan_run.py"))
    assert tool["main"](["--preset", "b", "--gpus", "64"]) == 0
    assert "A step on its slowest stage" in capsys.readouterr().out


def test_a_table_in_markdown_and_text():
    table = Table("Things", ("name", "count"), [("one", "1")], ["A note."])
    assert to_markdown([table]) == ("## Things\n\n| name | count |\n|---|---:|\n| one | 1 |\n\nA note.\n")
    assert "Things" in to_text([table]) and "A note." in to_text([table])
