"""Every operator's record against its reference, under Triton's interpreter and the memory checker.

The interpreter is chosen when triton is imported, so one process of its own runs all checks
(`interpret_ops.py`) and each test reads its result.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import iomm_kernels
from iomm_kernels.record import Case, Compile, Op

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(900)  # one process runs all checks: a minute and a half on a quiet core
CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name.replace(' ', '_')}")
    for op in iomm_kernels.OPS
    for case in op.cases
]
OPS = [pytest.param(op, id=op.name) for op in iomm_kernels.OPS]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The error of a check, "" if it passed."""
    path = tmp_path_factory.mktemp("interpreter") / "result.json"
    command = [sys.executable, str(HERE / "interpret_ops.py"), str(path)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()).__getitem__


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_kernel_is_as_exact_as_eager_in_value_and_gradient(
    op: Op, case: Case, result: Callable[[str], str]
) -> None:
    assert result(f"{op.name} | {case.name} | parity") == ""


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_kernel_stays_in_bounds_has_no_races_and_touches_the_stated_bytes(
    op: Op, case: Case, result: Callable[[str], str]
) -> None:
    assert result(f"{op.name} | {case.name} | memory") == ""


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_kernel_serves_bf16(op: Op, result: Callable[[str], str]) -> None:
    assert result(f"{op.name} | {op.cases[1].name} | bf16") == ""


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_operator_passes_opcheck_and_compiles_into_one_graph(
    op: Op, result: Callable[[str], str]
) -> None:
    assert result(f"{op.name} | {op.cases[1].name} | registration") == ""


@pytest.mark.parametrize("op", OPS)
def test_an_operator_has_a_case_a_compile_and_no_fewer_bytes_than_its_minimum(op: Op) -> None:
    assert len(op.cases) > 1
    assert op.compiles
    for compiled in op.compiles:
        _check_compile(compiled)


def _check_compile(compiled: Compile) -> None:
    arguments = set(compiled.kernel.arg_names)
    assert set(compiled.signature) | set(compiled.constexprs) == arguments, compiled.name
    assert set(compiled.aligned) <= set(compiled.signature), compiled.name
    assert compiled.bytes_actual >= compiled.bytes_min, compiled.name


@pytest.mark.parametrize("op", OPS)
def test_a_provider_that_cannot_serve_is_an_error_that_names_the_way_out(op: Op) -> None:
    args = op.cases[0].make(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="'triton' was asked for.*TRITON_INTERPRET.*'eager'"):
        op.fused(*args, provider="triton")
    with pytest.raises(ValueError, match="provider 'cuda' is none of auto, .*eager"):
        op.fused(*args, provider="cuda")


def test_every_operator_has_a_name_of_its_own_and_its_own_file() -> None:
    assert [op.name for op in iomm_kernels.OPS] == list(iomm_kernels.MODULES)
