"""Transformer Engine's layers stand in for the local ones name by name. Whatever needs the package itself
runs where it is installed; no test needs a GPU."""

import functools
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from iomm.config import ParallelConfig
from iomm.parallel import backend_choice
from iomm.parallel.backend_choice import choose_backend, fuses_gradients, te_missing
from tests.model.small_models import FLUX, Z_IMAGE, make

HERE = Path(__file__).parent
PACKAGES = ("transformer-engine", "transformer-engine-torch")


def _not_installed() -> str:
    """The first package that is missing; "" where Transformer Engine is."""
    for name in PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return name
    return ""


needs_te = pytest.mark.skipif(bool(_not_installed()), reason=f"{_not_installed()} is not installed")


def _pretended(*arguments: str) -> str:
    root = HERE.parents[1]
    path = os.pathsep.join((str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, str(HERE / "pretended_te.py"), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("config", [FLUX, Z_IMAGE])
def test_the_local_layers_have_the_recorded_names_shapes_and_splits_of_transformer_engines(
    config: Any,
) -> None:
    lines = [json.loads(line) for line in (HERE / "te_names.jsonl").read_text().splitlines()]
    recorded = {name: entry for family, name, *entry in lines if family == config.family}
    local = {
        name: [list(w.shape), w.partition_dim if getattr(w, "tensor_model_parallel", False) else None]
        for name, w in make(config).named_parameters()
    }
    assert list(local.items()) == list(recorded.items())
    assert {axis for _, axis in recorded.values()} == {None, 0, 1}


@needs_te
def test_the_record_is_what_the_installed_transformer_engine_gives() -> None:
    assert _pretended() == (HERE / "te_names.jsonl").read_text()


@needs_te
def test_checkpoints_recipes_regions_and_scales_fit_the_installed_transformer_engine() -> None:
    _pretended("--check")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch believes in, for the choice alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _found(names: tuple[str, ...]) -> Any:
    return lambda name: object() if name in names else None


def test_te_is_missing_for_a_reason_that_names_the_way_out(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", _found(()))
    assert "not installed; pip install -e '.[cuda]'" in str(te_missing(torch.bfloat16))
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", _found(("transformer_engine",)))
    assert "not installed" in str(te_missing(torch.bfloat16)), "a part of the packages is none of them"
    assert "no fp64; set train.precision=bf16" in str(te_missing(torch.float64))
    with pytest.raises(ValueError, match="parallel.backend = te, but .*fp64.* Or set parallel.backend=local"):
        choose_backend(ParallelConfig(backend="te"), torch.float64)


def test_te_that_does_not_import_is_missing_and_the_error_is_shown(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", _found(backend_choice._PACKAGES))
    monkeypatch.setattr(backend_choice.importlib, "import_module", broken)
    monkeypatch.setattr(backend_choice, "_import_error", backend_choice._import_error.__wrapped__)
    assert "does not import (libcudnn.so.9: cannot open" in str(te_missing(torch.bfloat16))


@pytest.mark.parametrize("missing, chosen", [(None, "te"), ("there is no GPU", "local")])
def test_auto_takes_te_where_it_can_and_says_why_once(
    missing: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_choice, "te_missing", lambda _: missing)
    monkeypatch.setattr(backend_choice, "_say", functools.cache(backend_choice._say.__wrapped__))
    with caplog.at_level(logging.INFO):
        assert [choose_backend(ParallelConfig(), torch.bfloat16) for _ in range(2)] == [chosen] * 2
    assert len(caplog.messages) == 1
    assert (
        f"auto: {chosen}, because " in caplog.text
        and (missing or "a GPU and Transformer Engine") in caplog.text
    )


def test_local_is_local_whatever_is_installed(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "te_missing", lambda _: None)
    assert choose_backend(ParallelConfig(backend="local"), torch.bfloat16) == "local"


def test_gradients_are_fused_by_te_and_for_the_local_layers_by_apex(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fuses_gradients("te")
    monkeypatch.setattr(
        backend_choice.importlib.util, "find_spec", _found(("fused_weight_gradient_mlp_cuda",))
    )
    assert fuses_gradients("local")
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", _found(()))
    assert not fuses_gradients("local")
