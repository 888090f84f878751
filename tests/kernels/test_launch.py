"""Choice of a provider."""

import logging
import subprocess
import sys

import pytest
import torch

from iomm_kernels import csrc, launch
from iomm_kernels.gated_residual import gated_residual
from iomm_kernels.gated_residual_modulate import gated_residual_modulate
from iomm_kernels.modulate import modulate
from iomm_kernels.qk_norm_rope import qk_norm_rope


def test_auto_takes_the_compiled_operator_where_it_is_and_says_once_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "_logged", set())
    monkeypatch.setattr(csrc, "problem", lambda name, device_type="cpu": None)
    assert launch.resolve("modulate", "auto", "cpu") == "csrc"
    monkeypatch.setattr(csrc, "problem", lambda name, device_type="cpu": "is not built (make kernels)")
    with caplog.at_level(logging.INFO, logger="iomm_kernels.launch"):
        assert launch.resolve("velocity_mse", "auto", "cpu") == "eager"
        assert launch.resolve("velocity_mse", "auto", "cpu") == "eager"
    assert [r.getMessage() for r in caplog.records] == [
        "velocity_mse on cpu: eager: csrc is not built (make kernels)"
    ]


def test_auto_takes_triton_on_a_gpu_and_eager_for_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert launch.resolve("modulate", "auto", "cuda") == "triton"
    assert launch.resolve("modulate", "auto", "cuda", torch.float64) == "eager"
    with pytest.raises(ValueError, match="'triton' was asked for on cuda, but it computes in fp32"):
        launch.resolve("modulate", "triton", "cuda", torch.float64)


def test_shapes_and_dtypes_that_do_not_fit_are_named() -> None:
    x, vector = torch.zeros(3, 2, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"scale has shape \(8,\); x \(3, 2, 8\) needs \(B, D\) = \(2, 8\)"):
        modulate(x, None, vector[0])
    with pytest.raises(ValueError, match="shift is torch.bfloat16 and x torch.float32"):
        modulate(x, vector.bfloat16(), vector)
    with pytest.raises(ValueError, match="norm 'batch' is none of layer, rms"):
        modulate(x, None, vector, "batch")
    with pytest.raises(ValueError, match=r"x \(3, 2, 8\) and y \(2, 2, 8\) have to be alike"):
        gated_residual(x, vector, x[:2])
    with pytest.raises(ValueError, match=r"x \(3, 2, 8\) and y \(2, 2, 8\) have to be alike"):
        gated_residual_modulate(x, vector, x[:2], vector, vector)
    q, table = torch.zeros(3, 2, 4, 8), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"the weights \(8,\) and \(1,\) \(K,\)"):
        qk_norm_rope(q, q, torch.ones(8), torch.ones(1), table, table)


def test_without_triton_every_operator_imports_and_runs_eagerly() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, iomm_kernels
for op in iomm_kernels.OPS:
    args = op.cases[0].make(torch.float32, torch.device("cpu"))
    op.fused(*args, provider="eager")
    op.fused(*args, provider="auto")
    assert op.bytes_issued(*args) >= 0
    try:
        op.fused(*args, provider="triton")
    except ValueError as error:
        assert "is not installed (pip install triton)" in str(error), error
    else:
        raise AssertionError(op.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
