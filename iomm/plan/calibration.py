"""How fast the work goes: efficiencies of single kernels, one factor for everything between them, and the
published runs that both come from.

    seconds = (sum over kinds of work / (kernel efficiency * peak)) / system factor

Kernel efficiencies are published measurements of kernels (`KERNELS`). The system factor covers what a sum of
kernels leaves out (shapes that do not fill the device, launches, jitter, clocks under power limits): the
geometric mean of published / predicted rates over `RUNS`. Each run's error is that of a factor fitted to the
others. No number here was taken by us on a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iomm.plan import elementwise
from iomm.plan.elementwise import Passes
from iomm.plan.hardware import Gpu, find_gpu
from iomm.plan.shapes import LmShape


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Fractions of an accelerator's peaks that its kernels reach."""

    gemm: float = 0.803
    gemm_fp8: float = 0.776
    attention: float = 0.39
    attention_backward: float = 0.28
    convolution: float = 0.5
    memory: float = 0.90
    system: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a kernel's efficiency comes from."""

    what: str
    value: str
    address: str


KERNELS = (
    Source(
        what="matrix products, bf16",
        value="794.5 of 989 TFLOP/s at the best shape on an H100 SXM: 0.803",
        address="github.com/stas00/ml-engineering, compute/accelerator (MAMF table)",
    ),
    Source(
        what="matrix products, FP8",
        value="1535 of 1979 TFLOP/s at the best shape on a GH200: 0.776",
        address="github.com/stas00/ml-engineering, compute/accelerator (MAMF table)",
    ),
    Source(
        what="attention, forward",
        value="390 TFLOP/s (FlashAttention-2 in Triton; FlashAttention-3: 517) at length 1024 and head size "
        "128 on an H100: 0.39",
        address="github.com/pytorch/benchmark/pull/2391",
    ),
    Source(
        what="attention, backward",
        value="FlashAttention-2 reaches 0.35 on an H100; it computes the scores again, 5 products where the "
        "derivative needs 4: 0.28",
        address="arXiv 2407.08608, abstract",
    ),
    Source(
        what="memory-bound operators",
        value="3.03 of 3.35 TB/s (QuACK's RMSNorm; cuDNN 2.89) on an H100: 0.90",
        address="huggingface.co/datasets/AccRL/accrl-training/discussions/32",
    ),
    Source(
        what="convolutions, TF32",
        value="0.5: an assumption, no measurement found",
        address="-",
    ),
)


def seconds_of(
    gpu: Gpu,
    efficiency: Efficiency,
    *,
    gemm: float = 0.0,
    gemm_fp8: float = 0.0,
    attention: float = 0.0,
    attention_backward: float = 0.0,
    convolution: float = 0.0,
    moved: float = 0.0,
) -> float:
    """Seconds of work, given as FLOPs and bytes."""
    kernels = (
        gemm / (efficiency.gemm * gpu.bf16_flops)
        + gemm_fp8 / (efficiency.gemm_fp8 * gpu.fp8_flops)
        + attention / (efficiency.attention * gpu.bf16_flops)
        + attention_backward / (efficiency.attention_backward * gpu.bf16_flops)
        + convolution / (efficiency.convolution * gpu.tf32_flops)
        + moved / (efficiency.memory * gpu.bandwidth)
    )
    return kernels / efficiency.system


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published training run of a causal decoder."""

    name: str
    tokens_per_s: float  # of one GPU
    address: str
    shape: LmShape
    length: int  # tokens of a sequence
    step_tokens: int  # of one GPU in an optimizer step
    fused: bool  # norms, rotation and activation as fused kernels
    fp8: bool = False
    products_again: float = 0.0  # share of the forward pass's matrix products that are recomputed
    elementwise_again: float = 0.0
    bandwidth: float | None = None  # of the device's memory where it is not the usual one, bytes/s
    ranks: int = 8  # over which the optimizer is sharded
    note: str = ""


def _llama(
    width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool
) -> LmShape:
    return LmShape(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        vocabulary=vocabulary,
        tied=tied,
        qkv_bias=False,
    )


_LLAMA_8B = _llama(4096, 32, 32, 8, 14336, 128_256, False)
_TITAN = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
RUNS = (
    Run(
        name="Llama 3.2 1B, nanotron, 8 H100",
        tokens_per_s=42_000,
        address="Smol Training Playbook (HuggingFaceTB), baseline ablation setup",
        shape=_llama(2048, 16, 32, 8, 8192, 128_256, True),
        length=4096,
        step_tokens=16 * 3 * 4096,
        fused=True,
    ),
    Run(
        name="Llama 2 7B, fms-fsdp, H100",
        tokens_per_s=9_600,
        address="github.com/foundation-model-stack/fms-fsdp/issues/89",
        shape=_llama(4096, 32, 32, 32, 11008, 32_000, False),
        length=4096,
        step_tokens=2 * 4096,
        fused=True,
        ranks=128,
        note="micro-batch 2, no recompute, 128 ranks as in the repository's A100 row",
    ),
    Run(
        name="Llama 3.1 8B, torchtitan, eager, 8 H100",
        tokens_per_s=5_762,
        address=_TITAN,
        shape=_LLAMA_8B,
        length=8192,
        step_tokens=2 * 8192,
        fused=False,
        products_again=0.5,
        elementwise_again=1.0,
        bandwidth=2.4e12,
        note="H100 with 2.4 TB/s and 500 W",
    ),
    Run(
        name="Llama 3.1 8B, torchtitan, compiled, 8 H100",
        tokens_per_s=6_667,
        address=_TITAN,
        shape=_LLAMA_8B,
        length=8192,
        step_tokens=2 * 8192,
        fused=True,
        products_again=0.5,
        elementwise_again=1.0,
        bandwidth=2.4e12,
        note="H100 with 2.4 TB/s and 500 W",
    ),
    Run(
        name="Llama 3.1 8B, torchtitan, compiled, FP8, 8 H100",
        tokens_per_s=8_532,
        address=_TITAN,
        shape=_LLAMA_8B,
        length=8192,
        step_tokens=2 * 8192,
        fused=True,
        fp8=True,
        products_again=0.5,
        elementwise_again=1.0,
        bandwidth=2.4e12,
        note="H100 with 2.4 TB/s and 500 W",
    ),
    Run(
        name="Llama 3 8B, Megatron-Bridge, FP8, 8 H100",
        tokens_per_s=14_451,
        address="github.com/NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md (25.11)",
        shape=_LLAMA_8B,
        length=8192,
        step_tokens=16 * 8192,
        fused=True,
        fp8=True,
        note="cuDNN attention, faster than FlashAttention-2",
    ),
)


def predicted_tokens_per_s(run: Run, efficiency: Efficiency) -> float:
    """Of one GPU; communication is taken as hidden."""
    shape, gpu = run.shape, find_gpu("h100")
    layers = shape.layers * 2.0 * shape.layer_weights * (3 + run.products_again)
    head = 3 * 2.0 * shape.vocabulary * shape.width
    attention = shape.layers * 2.0 * run.length * shape.width  # causal: half of the square
    passes = _decoder_passes(shape, run.fused)
    forward = passes.forward(run.fused) * (1 + run.elementwise_again)
    moved = shape.layers * shape.width * 2.0 * (forward + passes.backward(run.fused))
    if run.fp8:  # inputs of the linears, cast twice in either direction
        moved += shape.layers * 2 * 4.0 * (3 * shape.width + shape.mlp)
    moved += (10 if run.fused else 24) * shape.vocabulary  # logits and loss, bytes a number
    moved += 42.0 * shape.weights / run.ranks / run.step_tokens  # optimizer and norm, bytes a weight
    seconds = seconds_of(
        gpu,
        efficiency,
        gemm=head + (0 if run.fp8 else layers),
        gemm_fp8=layers if run.fp8 else 0,
        attention=attention,
        attention_backward=2 * attention,
        moved=moved * gpu.bandwidth / (run.bandwidth or gpu.bandwidth),
    )
    return 1 / seconds


def _decoder_passes(shape: LmShape, fused: bool) -> Passes:
    """Per row and channel of a decoder layer: two norms, two residual sums, rotation, gated activation."""
    rotated = 1 + shape.kv_width / shape.width
    rotation = Passes(12, 14, 2, 3) if not fused else elementwise.ROTATE
    residual = Passes(3, 3, 3, 3)
    activation = elementwise.SILU_TIMES * (shape.mlp / shape.width)
    return (elementwise.NORM + residual) * 2 + rotation * rotated + activation


@dataclass(frozen=True, kw_only=True)
class Check:
    """A published run against the model."""

    run: Run
    predicted: float  # with the fitted factor, tokens/s
    left_out: float  # with the factor fitted to the other runs

    @property
    def error(self) -> float:
        return self.predicted / self.run.tokens_per_s - 1

    @property
    def left_out_error(self) -> float:
        return self.left_out / self.run.tokens_per_s - 1


def fit(runs: Sequence[Run] = RUNS) -> Efficiency:
    """The kernels' efficiencies with the system factor of these runs."""
    logs = [math.log(run.tokens_per_s / predicted_tokens_per_s(run, Efficiency())) for run in runs]
    return Efficiency(system=math.exp(sum(logs) / len(logs)))


def checks() -> list[Check]:
    """Every run, predicted with all runs and without it."""
    everything = fit()
    return [
        Check(
            run=run,
            predicted=predicted_tokens_per_s(run, everything),
            left_out=predicted_tokens_per_s(run, fit([other for other in RUNS if other is not run])),
        )
        for run in RUNS
    ]


def spread(runs: Sequence[Run] = RUNS) -> tuple[Efficiency, Efficiency]:
    """The kernels' efficiencies with the factor of the slowest and of the fastest run."""
    fitted = [fit([run]) for run in runs]
    return min(fitted, key=lambda e: e.system), max(fitted, key=lambda e: e.system)
