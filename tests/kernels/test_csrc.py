"""Compiled CPU operators against fp64 references, and the loader that says why there are none."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iomm_kernels
from iomm_kernels import build, csrc, philox
from iomm_kernels.mask_tokens import keep_tokens
from iomm_kernels.record import Case, Op

CPU = torch.device("cpu")
COMPILED = (
    "mask_tokens",
    "modulate",
    "gated_residual",
    "gated_residual_modulate",
    "flow_noise",
    "velocity_mse",
)
OPS = {op.name: op for op in iomm_kernels.OPS}
CASES = [
    pytest.param(OPS[name], case, dtype, id=f"{name}-{case.name}-{str(dtype)[6:]}".replace(" ", "_"))
    for name in COMPILED
    for case in OPS[name].cases
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.fixture(autouse=True)
def library(compiled_cpu: Path) -> None:
    assert compiled_cpu.is_dir()


def run(op: Op, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, then the gradients of what has any, for the same gradients of the outputs."""
    inputs = [
        x.detach().requires_grad_(i in op.differentiable)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for i, x in enumerate(arguments)
    ]
    found = function(*inputs)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return outputs
    torch.manual_seed(0)
    gradients = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if found.numel() else 0.0


def assert_as_exact_as_eager(op: Op, arguments: tuple[Any, ...]) -> None:
    exact = run(op, op.reference, widened(arguments))
    eager = run(op, functools.partial(op.fused, provider="eager"), arguments)
    compiled = run(op, functools.partial(op.fused, provider="csrc"), arguments)
    for reference, ours, theirs in zip(exact, compiled, eager, strict=True):
        assert ours.shape == reference.shape
        assert ours.dtype == theirs.dtype
        if not ours.numel() or reference.isnan().all():
            assert torch.equal(ours.isnan(), reference.isnan())
            continue
        ulp = torch.finfo(ours.dtype).eps * reference.abs().max().item()
        assert error(ours, reference) <= 2 * error(theirs, reference) + ulp


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_a_compiled_operator_is_as_exact_as_eager_in_value_and_gradient(
    op: Op, case: Case, dtype: torch.dtype
) -> None:
    assert_as_exact_as_eager(op, case.make(dtype, CPU))


@pytest.mark.parametrize("name", ["modulate", "gated_residual"])
@pytest.mark.parametrize("channels", [768, 760])
def test_so_are_outputs_of_8_mib_which_are_written_past_the_caches_where_rows_are_multiples_of_64_bytes(
    name: str, channels: int
) -> None:
    torch.manual_seed(0)
    x_LBD, y_LBD = torch.randn(2, 360, 8, channels)
    shift_BD, scale_BD = torch.randn(8, 2 * channels).chunk(2, dim=-1)
    assert_as_exact_as_eager(OPS[name], (x_LBD, shift_BD, scale_BD if name == "modulate" else y_LBD))


@pytest.mark.parametrize("name", [name for name in COMPILED if name != "mask_tokens"])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    op = OPS[name]
    arguments = op.bench("cpu", 320, torch.float32, CPU)  # 400 tokens of 8 samples: several threads, streamed
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(op, functools.partial(op.fused, provider="csrc"), arguments))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("tokens", [1, 7, 256, 1000])
def test_the_compiled_mask_has_the_bits_of_philox(ratio: float, tokens: int) -> None:
    index_B = torch.tensor([0, 5, 2**33 + 7, 2**40 - 3])
    for seed in (0, 2**40 + 7, 2**63 + 11):
        compiled = keep_tokens(index_B, tokens, seed, ratio, provider="csrc")
        assert torch.equal(compiled, philox.uniform(seed, 3, index_B, tokens) >= ratio)


def test_the_compiled_noise_is_philox_normals_to_a_few_units_in_the_last_place() -> None:
    index_B = torch.tensor([3, 2**33])
    zeros, ones = torch.zeros(2, 100_003), torch.ones(2)
    x_t, target = torch.ops.iomm_csrc.flow_noise(zeros, ones, index_B, 77, 1)
    expected = philox.normal(77, 1, index_B, 100_003)
    torch.testing.assert_close(x_t, expected, rtol=4e-7, atol=4e-7)
    assert torch.equal(target, x_t)


def call(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.iomm_csrc, name)(*arguments)


X, VECTOR = torch.zeros(4, 2, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ("modulate", X[0], None, VECTOR, False, 1e-6),
            r"tokens have to be \(L, B, D\) with D > 0, got \(2, 8\)",
        ),
        (("modulate", X, None, VECTOR[:1], False, 1e-6), r"scale is \(1, 8\).*\(4, 2, 8\) need \(2, 8\)"),
        (
            ("modulate", X.double(), None, VECTOR, False, 1e-6),
            "Double is not supported; give fp32, bf16 or fp16",
        ),
        (("gated_residual", X, VECTOR, X.half()), r"y is \(4, 2, 8\) Half.*\(4, 2, 8\) Float"),
        (("velocity_mse", X, X[:3]), r"target is \(3, 2, 8\).*\(4, 2, 8\)"),
        (("flow_noise", X, torch.zeros(3), torch.arange(4), 0, 1), r"t is \(3\).*needs \(4\)"),
        (
            ("flow_noise", X, torch.zeros(4), torch.arange(4).int(), 0, 1),
            r"int64 of shape \(4\), got \(4\) Int",
        ),
        (("mask_tokens", X, torch.arange(4), None, 0, 3, -1), r"threshold -1 is outside \[0, 2\^32\)"),
        (("keep_tokens", torch.arange(4), torch.zeros(3, dtype=torch.bool), 5, 0, 3, 1), r"hidden .*\(4\)"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_was_given_and_what_is_needed(
    wrong: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(*wrong)


def test_gradients_that_are_broadcast_or_transposed_are_read_right() -> None:
    x_LBD, y_LBD, gate_BD = torch.randn(8, 2, 6).permute(2, 1, 0), torch.randn(6, 2, 8), torch.randn(2, 8)
    dout_LBD = torch.randn(8).expand(6, 2, 8)
    dy, dgate = torch.ops.iomm_csrc.gated_residual_backward(dout_LBD, gate_BD, y_LBD)
    torch.testing.assert_close(dy, dout_LBD * gate_BD)
    torch.testing.assert_close(dgate, (dout_LBD * y_LBD).sum(0))
    torch.testing.assert_close(
        torch.ops.iomm_csrc.gated_residual(x_LBD, gate_BD, y_LBD), x_LBD + gate_BD * y_LBD
    )


def test_the_loader_says_which_operator_is_missing_for_which_device() -> None:
    assert csrc.problem("modulate", "cpu") is None
    assert csrc.problem("no_such", "cpu") == "has no compiled operator no_such for cpu tensors"
    assert csrc.problem("modulate", "mps") == "has no mps operators"


def test_a_library_that_is_not_there_or_older_than_its_sources_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloaded = inspect.unwrap(csrc.load_problem)  # without the cache
    monkeypatch.setenv("IOMM_CSRC_DIR", str(tmp_path))
    assert "_csrc.abi3.so is not there (run `make kernels`; it needs c++)" in str(unloaded("cpu"))
    (tmp_path / build.CPU.file).write_text("of last week")
    (tmp_path / f"{build.CPU.file}.digest").write_text("0123")
    assert "is older than its sources in" in str(unloaded("cpu"))
    (tmp_path / f"{build.CPU.file}.digest").write_text(build.CPU.digest())
    assert str(unloaded("cpu")).startswith("does not load: ")


@pytest.mark.parametrize("library", [build.CPU, build.CUDA])
def test_the_digest_covers_every_header_that_the_sources_include(library: build.Library) -> None:
    pending, seen = library.sources(), set[Path]()
    while pending:
        source = pending.pop()
        seen.add(source)
        included = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
        pending += [path for name in included if (path := build.SOURCES / name) not in seen]
    headers = {path.name for path in seen if path.suffix == ".h"}
    assert {name for name in headers if not name.startswith(library.headers)} == set()


def test_the_cuda_library_registers_its_operators_where_it_is_built() -> None:
    if problem := csrc.load_problem("cuda"):
        pytest.skip(f"the CUDA library {problem}")
    for name in ("pack_index", "pack_rows", "take_rows", "ema_update_"):
        assert csrc.problem(name, "cuda") is None
        assert csrc.problem(name, "cpu") == f"has no compiled operator {name} for cpu tensors"


def test_without_a_compiler_or_sources_building_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match="needs a compiler 'no-such-compiler' on PATH, or another named in CXX"
    ):
        build.build(build.CPU, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert "has no sources here" in str(build.CPU.problem())


def test_the_cuda_library_links_against_a_stand_in_where_torch_is_a_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build.CUDA.program() is None:
        pytest.skip("there is no nvcc")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cpu.so").touch()
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path)
    assert build.CUDA.missing() == ["torch_cuda"]
    stub, link = build.link_commands(build.CUDA, [tmp_path / "a.o"], tmp_path / "made" / build.CUDA.file)
    assert "-Wl,-soname=libtorch_cuda.so" in stub
    assert f"-L{tmp_path / 'made'}" in link
    assert link[-2:] == ["-o", str(tmp_path / "made" / build.CUDA.file)]


def test_what_the_compiler_says_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cpp").write_text("#error this is not an operator\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match="this is not an operator"):
        build.build(build.CPU, tmp_path)
    assert not (tmp_path / build.CPU.file).exists()
