"""Runs to the Hugging Face layout and back: the same numbers, the same pictures, whole folders or none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iomm.checkpoint import hf_export, sharded
from iomm.checkpoint.generator import open_generator
from iomm.checkpoint.hf import export_run, import_folder, inspect, verify
from iomm.checkpoint.hf_run import RunWeights
from iomm.checkpoint.portable.pipeline import philox_normal
from iomm.checkpoint.sharded import CheckpointError
from iomm.checkpoint.streaming import SafetensorsReader
from iomm.cli import main
from iomm.encoders import Encoders
from iomm.flow.sampler import sample
from iomm.random import Stream, normal
from iomm.sampling import paint, painting
from iomm.system import System
from iomm.training.train import train
from tests.random_run import Z_IMAGE, save_random_run
from tests.small_run import config_file, small_config
from tests.tiny_models import save_qwen3_vl

PROMPTS = ["red ball", "a gold ball"]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory, mesh):
    """Runs by name: one trained, the others random."""
    folder = tmp_path_factory.mktemp("runs")
    trained = small_config(
        world, folder, "trained", train__steps=2, train__eval_every_steps=99, train__sample_every_steps=99
    )
    train(trained)
    qwen = save_qwen3_vl(folder / "qwen")
    other = {
        "mllm__path": str(qwen),
        "condition__condition_tokens": "all",
        "condition__connector__kind": "mlp",
        "generator__single_blocks": 1,
        "generator__guidance_embedding": True,
        "generator__pooled_width": 5,
        "flow__shift": 2.0,
    }
    return {
        "trained": trained.run_dir,
        "z_image": save_random_run(small_config(world, folder, "z_image", **Z_IMAGE)),
        "all_tokens": save_random_run(small_config(world, folder, "all_tokens", **other)),
    }


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {name: export_run(run, folder / name) for name, run in runs.items()}


def refer_to_mllm(exported: Path, folder: Path) -> Path:
    """A copy that names its MLLM, as that of a run with a hub name does."""
    target = folder / "referring"
    shutil.copytree(exported, target)
    (target / "text_encoder").rename(folder / "elsewhere")
    index = json.loads((target / "model_index.json").read_text())
    source = {"name": str(folder / "elsewhere"), "revision": None}
    index |= {"text_encoder": [None, None], "text_encoder_source": source}
    (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.fixture(scope="module")
def painted(exported, tmp_path_factory):
    """What a process without iomm paints with the exported folders."""
    folder = tmp_path_factory.mktemp("painted")
    folders = [str(f) for f in (*exported.values(), refer_to_mllm(exported["trained"], folder))]
    arguments = (json.dumps(PROMPTS), json.dumps(folders), folder / "out.pt")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("paint_exported.py"), *map(str, arguments)],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", "z_image", "all_tokens"])
def test_a_process_without_iomm_paints_the_same_pictures(runs, exported, painted, name):
    _, encoders, system = open_generator(runs[name], ema=True)
    task, shift = painting(system, encoders, PROMPTS, seed=3, guidance=3.0), system.config.flow.shift
    ours = sample(task.velocity, task.noise_BLC, steps=3, method="euler", shift=shift).x_BLC
    theirs = painted[str(exported[name])]
    assert (theirs["latents"] - ours).abs().max() <= 1e-4 * ours.abs().max()
    pictures = paint(system, encoders, PROMPTS, seed=3, steps=3, guidance=3.0).permute(0, 2, 3, 1)
    assert (theirs["pictures"].int() - pictures.int()).abs().max() <= 1


@pytest.mark.slow
def test_a_folder_may_refer_to_its_mllm_by_name(exported, painted):
    (referring,) = (v for k, v in painted.items() if Path(k).name == "referring")
    assert torch.equal(referring["latents"], painted[str(exported["trained"])]["latents"])


def test_the_transformer_loads_with_the_stock_class_and_no_remote_code(exported):
    from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel

    for name, stock in (("trained", FluxTransformer2DModel), ("z_image", ZImageTransformer2DModel)):
        model, info = stock.from_pretrained(
            exported[name], subfolder="transformer", low_cpu_mem_usage=False, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert next(model.parameters()).dtype == torch.float32


def test_noise_of_the_pipeline_is_that_of_iomm():
    ours = normal(2**33 + 5, Stream.SAMPLE, torch.arange(3), 9)
    assert torch.equal(philox_normal(2**33 + 5, 3, 9), ours)


@pytest.mark.parametrize("name", ["trained", "z_image"])
def test_export_import_export_gives_every_file_again(exported, tmp_path, name):
    first = exported[name]
    imported = import_folder(first, tmp_path / "run")
    assert imported.notes == ()
    second = export_run(tmp_path / "run", tmp_path / "again", ema=False)
    files = {f.relative_to(first) for f in first.rglob("*") if f.is_file()}
    assert files == {f.relative_to(second) for f in second.rglob("*") if f.is_file()}
    assert [f for f in files if (first / f).read_bytes() != (second / f).read_bytes()] == []


def test_the_average_is_exported_unless_the_weights_themselves_are_asked_for(runs, exported, tmp_path):
    raw = export_run(runs["z_image"], tmp_path / "raw", ema=False)
    name = "layers.0.attention.to_q.weight"
    tensors = [SafetensorsReader(f / "transformer").get(name) for f in (exported["z_image"], raw)]
    weights = [RunWeights(runs["z_image"], ema=ema).theirs(name) for ema in (True, False)]
    assert torch.equal(tensors[0], weights[0])
    assert torch.equal(tensors[1], weights[1])
    assert not torch.equal(*tensors)
    assert "the last step's (raw)" in (raw / "README.md").read_text()
    assert "average over training (EMA)" in (exported["z_image"] / "README.md").read_text()


def test_an_export_in_bf16_verifies_against_its_run(runs, tmp_path):
    folder = export_run(runs["trained"], tmp_path / "half", dtype=torch.bfloat16)
    assert {s.dtype for s in SafetensorsReader(folder / "transformer").specs.values()} == {torch.bfloat16}
    assert verify(folder, runs["trained"], outputs=False).equal


def test_nothing_is_written_over_and_a_failed_export_leaves_nothing(runs, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_run(runs["trained"], tmp_path / "there")

    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export_run(runs["trained"], tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", ["trained", "z_image", "all_tokens"])
def test_verify_finds_a_folder_and_its_run_equal(runs, exported, name):
    report = verify(exported[name], runs[name])
    assert report.equal, report.text()
    assert [m.module for m in report.modules] == ["transformer", "query adapter", "vae"]
    written = json.loads(exported[name].with_name(f"{name}.verify.json").read_text())
    assert written["equal"] is True
    assert len(written["modules"][0]["hashes"]) == report.modules[0].tensors


def test_verify_names_the_tensors_that_differ(runs, exported, tmp_path):
    report = verify(exported["z_image"], runs["z_image"], ema=False)
    assert not report.equal
    assert "layers.0.attention.to_q.weight" in report.modules[0].differing
    assert (report.modules[0].output_difference or 0) > 1e-3
    assert report.modules[2].equal
    assert "NOT EQUAL" in report.text()


def test_a_run_starts_from_an_imported_checkpoint_but_does_not_go_on_from_it(
    runs, exported, world, tmp_path, mesh
):
    imported = import_folder(exported["z_image"], tmp_path / "imported").checkpoint
    settings = {**Z_IMAGE, "train__steps": 1, "train__eval_every_steps": 99, "train__sample_every_steps": 99}
    config = small_config(world, tmp_path, "next", train__init_from=str(tmp_path / "imported"), **settings)
    system = System(config, Encoders(config, mesh.device).shapes, mesh)
    sharded.load_weights(imported, system, ema=False, mesh=mesh, config=config)
    weights = RunWeights(runs["z_image"], ema=True)
    assert all(torch.equal(p, weights.get(n)) for n, p in system.state_dict().items())
    assert train(config).step == 1
    shutil.copytree(tmp_path / "imported" / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match="was imported: it holds weights and no optimizer"):
        train(small_config(world, tmp_path, "other", **settings))


def test_the_commands_export_import_and_inspect(runs, tmp_path, capsys, world):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert main(["export", str(runs["trained"]), "-o", out]) == 0
    config = config_file(small_config(world, tmp_path, "trained"), tmp_path / "config.py")
    assert main(["import", out, "-o", back, "--config", str(config)]) == 0
    assert f"--set train.init_from={back}" in capsys.readouterr().out
    assert main(["import", out, "-o", back]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert "FluxTransformer2DModel" in inspect(Path(out))
    assert "family flux, EMA not kept" in inspect(Path(back))


@pytest.mark.multi
def test_an_imported_checkpoint_fills_two_tensor_parallel_ranks(exported, tmp_path, torchrun):
    import_folder(exported["trained"], tmp_path / "run")
    torchrun(Path(__file__).with_name("ranks_imported.py"), tmp_path / "run", timeout_s=200)
