"""Measures the operators: every provider against every other on the same inputs, in one run, taken in turn.

    bytes    forward: the record's `bytes_moved` (inputs once, outputs once). backward: what has to be read
             and written at least, the gradients of outputs and inputs (one that is passed on unchanged counts
             once). both: their sum
    flops    where the record states them: forward as stated, backward 2.5 times that (the products are made
             again), both 3.5 times
    ceiling  copy bandwidth (read and write) or matrix product in the same dtype, measured in the same run
    ratio    over a peer: median of the ratios of neighbouring runs, so that a slow moment meets both

On a GPU a buffer larger than L2 is written between calls, and CUDA events give the time.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import iomm_kernels
from iomm_kernels.bench_peers import PEERS
from iomm_kernels.bench_timer import Call, Timer, ceilings
from iomm_kernels.record import Op

PROVIDERS = ("eager", "compile", "triton", "csrc", "sdpa", "flash", "te", "liger")
PASSES = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. Names are checked against what there is."""

    ops: tuple[str, ...]
    presets: tuple[str, ...]
    sides_px: tuple[int, ...]
    dtypes: tuple[str, ...]
    providers: tuple[str, ...]
    passes: tuple[str, ...]
    device: str
    repeats: int

    def __post_init__(self) -> None:
        _known("operator", self.ops, iomm_kernels.MODULES)
        _known("dtype", self.dtypes, DTYPES)
        _known("provider", self.providers, PROVIDERS)
        _known("pass", self.passes, PASSES)
        if self.repeats < 1:
            raise ValueError(f"{self.repeats} repeats: at least 1 is needed.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees no GPU. Use --device cpu.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider in one pass of one shape. Times in milliseconds."""

    op: str
    preset: str
    side_px: int
    dtype: str
    pass_name: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float
    tflop_per_s: float | None
    percent_of_ceiling: float
    faster_than: dict[str, float]  # peer -> how many times as fast as it this is

    @property
    def key(self) -> tuple[str, str, int, str, str, str]:
        """What makes rows of two runs the same measurement."""
        return self.op, self.preset, self.side_px, self.dtype, self.pass_name, self.provider


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was not measured, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run of the benchmark."""

    device: str
    torch: str
    threads: int
    repeats: int
    copy_gb_per_s: float
    matmul_tflop_per_s: dict[str, float]  # by dtype
    rows: list[Row]
    skipped: list[Skipped]


def measure(request: Request, say: Callable[[str], None] = lambda _: None) -> Result:
    """Run the benchmark; `say` hears what is being measured.

    Raises:
        ValueError: a preset or image size that does not exist.
    """
    device = torch.device(request.device)
    timer = Timer(device)
    before = ceilings(timer, [DTYPES[name] for name in request.dtypes])
    rows: list[Row] = []
    skipped: list[Skipped] = []
    wanted = [op for op in iomm_kernels.OPS if op.name in request.ops]
    for op in wanted:
        for preset in request.presets:
            for side_px in request.sides_px:
                for dtype in request.dtypes:
                    say(f"{op.name} {preset} {side_px} px {dtype}")
                    found, missed = _one_shape(op, preset, side_px, dtype, request, timer)
                    rows += found
                    skipped = list(dict.fromkeys((*skipped, *missed)))
    after = ceilings(timer, [DTYPES[name] for name in request.dtypes])
    better = [max(pair) for pair in zip(before, after, strict=True)]  # of two moments of the machine
    copy_gb_per_s, *products = better
    matmul = dict(zip(request.dtypes, products, strict=True))
    return Result(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        repeats=request.repeats,
        copy_gb_per_s=copy_gb_per_s,
        matmul_tflop_per_s=matmul,
        rows=[_with_ceiling(row, copy_gb_per_s, matmul[row.dtype]) for row in rows],
        skipped=skipped,
    )


def _one_shape(
    op: Op, preset: str, side_px: int, dtype: str, request: Request, timer: Timer
) -> tuple[list[Row], list[Skipped]]:
    arguments = op.bench(preset, side_px, DTYPES[dtype], timer.device)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for name in request.passes:
        if name != "forward" and not op.differentiable:
            skipped.append(Skipped(what=f"{op.name}: {name}", why="has no gradient"))
            continue
        calls, missed = _calls(op, arguments, request.providers, name)
        skipped += missed
        moved, flops = _work(op, arguments, name)
        times = timer.in_turn(calls, request.repeats)
        for provider, found in times.items():
            low, median, high = _percentiles(found)
            peers = {peer: other for peer, other in times.items() if peer != provider}
            rows.append(
                Row(
                    op=op.name,
                    preset=preset,
                    side_px=side_px,
                    dtype=dtype,
                    pass_name=name,
                    provider=provider,
                    median_ms=median,
                    p20_ms=low,
                    p80_ms=high,
                    gb_per_s=moved / median / 1e6,
                    tflop_per_s=None if flops is None else flops / median / 1e9,
                    percent_of_ceiling=0.0,
                    faster_than={
                        peer: statistics.median(b / a for a, b in zip(found, other, strict=True))
                        for peer, other in peers.items()
                    },
                )
            )
    return rows, skipped


def _calls(
    op: Op, arguments: Sequence[Any], providers: Iterable[str], pass_name: str
) -> tuple[dict[str, Call], list[Skipped]]:
    """A warm call of each provider that can serve these arguments, and why the others cannot."""
    calls: dict[str, Call] = {}
    skipped: list[Skipped] = []
    for provider in providers:
        if not _offers(op, provider):
            continue
        try:
            call = _call(op, _function(op, provider), arguments, pass_name)
            call()  # compiles, and says what is missing
        except Exception as error:  # of whatever kind a peer raises; reported with its first line
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            skipped.append(Skipped(what=f"{op.name}: {provider}", why=why))
        else:
            calls[provider] = call
    return calls, skipped


def _offers(op: Op, provider: str) -> bool:
    """Whether a provider has this operator at all; the attentions are those that state flops."""
    if provider in ("te", "liger"):
        return (op.name, provider) in PEERS
    return provider not in (("csrc",) if op.flops is not None else ("sdpa", "flash"))


def _function(op: Op, provider: str) -> Callable[..., Any]:
    if provider == "eager":
        return op.reference
    if provider == "compile":
        return torch.compile(op.reference, dynamic=False)
    if (op.name, provider) in PEERS:
        return PEERS[op.name, provider]()
    return lambda *arguments: op.fused(*arguments, provider=provider)


def _call(op: Op, function: Callable[..., Any], arguments: Sequence[Any], pass_name: str) -> Call:
    """A call without arguments that does one pass."""
    if pass_name == "forward":
        return torch.no_grad()(lambda: function(*arguments))
    inputs = _inputs(op, arguments)
    wanted = [inputs[i] for i in op.differentiable if isinstance(inputs[i], Tensor)]
    outputs = _differentiable(function(*inputs))
    gradients = [torch.ones_like(output) for output in outputs]
    if pass_name == "backward":
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(_differentiable(function(*inputs)), wanted, gradients)


def _inputs(op: Op, arguments: Sequence[Any]) -> list[Any]:
    """The arguments, those with gradients as leaves of the graph."""
    return [
        value.detach().requires_grad_() if isinstance(value, Tensor) and i in op.differentiable else value
        for i, value in enumerate(arguments)
    ]


def _differentiable(outputs: Any) -> list[Tensor]:
    found = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [value for value in found if isinstance(value, Tensor) and value.requires_grad]


def _work(op: Op, arguments: Sequence[Any], pass_name: str) -> tuple[int, int | None]:
    """Bytes and flops of a pass, as the module's header says."""
    flops = None if op.flops is None else op.flops(*arguments)
    forward = op.bytes_moved(*arguments)
    if pass_name == "forward":
        return forward, flops
    inputs = _inputs(op, arguments)
    outputs = _differentiable(op.reference(*inputs))
    gradients = [torch.ones_like(output) for output in outputs]
    wanted = [inputs[i] for i in op.differentiable if isinstance(inputs[i], Tensor)]
    made = torch.autograd.grad(outputs, wanted, gradients)
    memory = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in (*gradients, *made)}
    backward = sum(memory.values())
    if pass_name == "backward":
        return backward, None if flops is None else round(2.5 * flops)
    return forward + backward, None if flops is None else round(3.5 * flops)


def _with_ceiling(row: Row, copy_gb_per_s: float, matmul_tflop_per_s: float) -> Row:
    """With flops stated, the higher of the two shares: what the operator is bound by."""
    shares = [row.gb_per_s / copy_gb_per_s]
    if row.tflop_per_s is not None:
        shares.append(row.tflop_per_s / matmul_tflop_per_s)
    return Row(**{**vars(row), "percent_of_ceiling": 100 * max(shares)})


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    low, median, high = quantiles.tolist()
    return low, median, high


def _known(kind: str, names: Iterable[str], there: Iterable[str]) -> None:
    for name in names:
        if name not in there:
            raise ValueError(f"{kind} {name!r} is none of {', '.join(there)}.")
