"""The tables of one layout's plan, and the plan as plain data."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from iomm.plan import calibration, costs
from iomm.plan.caches import bytes_per_image, caches
from iomm.plan.calibration import Efficiency
from iomm.plan.costs import Item
from iomm.plan.hardware import GIB
from iomm.plan.layouts import describe
from iomm.plan.step import Estimate, stages_of
from iomm.plan.tables import Table
from iomm.plan.weights import codec_weights, conditioner_weights, generator_weights
from iomm.plan.workload import Workload, varied


def plan_tables(
    made: Estimate, fitted: Efficiency, images: float, distinct: float, price: float | None
) -> list[Table]:
    """Everything about one layout."""
    return [
        parameters(made.work),
        image_bill(made),
        moved_by_family(made.work, made, fitted),
        memory(made),
        traffic(made),
        step(made),
        outcome(made, fitted, images, price),
        caches(made.work, distinct),
    ]


def parameters(work: Workload) -> Table:
    """How many weights there are, trained and frozen."""
    config = work.config
    whole = stages_of(varied(work, parallel__virtual_stages=1, parallel__pp=1))[0]
    generator = generator_weights(config.generator, 1, whole)
    conditioner = conditioner_weights(config.condition, work.mllm.lm.width, config.generator.condition_width)
    adapter = sum(w.numbers for n, w in conditioner.items() if ".adapter." in n)
    connector = sum(w.numbers for n, w in conditioner.items() if ".connector." in n)
    lm, vit = work.mllm.lm, work.mllm.vit.weights(work.mllm.lm.width)
    head = 0 if lm.tied else lm.vocabulary * lm.width
    rows = [
        ("generator", "trained", f"{sum(w.numbers for w in generator.values()) / 1e6:,.1f}"),
        ("adapter (RQA)", "trained", f"{adapter / 1e6:,.1f}"),
        ("connector", "trained", f"{connector / 1e6:,.1f}"),
        ("LM, of which its head is never run", "frozen", f"{lm.weights / 1e6:,.1f} ({head / 1e6:,.1f})"),
        ("ViT and projector", "frozen", f"{vit / 1e6:,.1f}"),
        ("autoencoder", "frozen", f"{codec_weights(work.codec) / 1e6:,.1f}"),
    ]
    unread = sum(w.numbers for w in generator.values() if not w.trained)
    note = f"Of the generator {unread / 1e6:.1f} M are kept frozen: nothing reads them." if unread else ""
    return Table("Parameters", ("part", "", "millions"), rows, [note] if note else [])


def image_bill(made: Estimate) -> Table:
    """FLOPs, bytes and milliseconds of one image on one GPU."""
    total = sum(seconds for _, seconds in made.items)
    rows = [
        (
            item.name,
            f"{item.flops / 1e12:.3f}",
            f"{item.flops / made.flops:.1%}" if not item.again else "-",
            f"{item.moved / 1e9:.2f}",
            f"{1000 * seconds:.2f}",
            f"{seconds / total:.1%}",
        )
        for item, seconds in made.items
    ]
    moved = sum(item.moved for item, _ in made.items)
    rows.append(("sum", f"{made.flops / 1e12:.3f}", "", f"{moved / 1e9:.2f}", f"{1000 * total:.2f}", ""))
    columns = ("item", "TFLOP", "share", "GB moved", "ms", "share of time")
    work, size = made.work, made.work.config.train.micro_batch_images
    note = (
        f"{work.image_tokens} image tokens, {work.condition_tokens(size):.0f} condition tokens, prefix of "
        f"{work.prefix_tokens(size):.0f}. TFLOP counts matrix products, attention and convolutions; GB what "
        "memory-bound operators read and write."
    )
    return Table("One image", columns, rows, [note])


def moved_by_family(work: Workload, made: Estimate, efficiency: Efficiency) -> Table:
    """Memory-bound operators: of the generator by family, and of a step."""
    tokens = round(work.condition_tokens(work.config.train.micro_batch_images))

    def moved(fused: bool) -> dict[str, float]:
        return costs.generator_moved(work, tokens, lambda p: p.forward(fused) + p.backward(fused))

    eager, fused = moved(False), moved(True)
    rate = efficiency.memory * made.cluster.gpu.bandwidth * efficiency.system
    rows = [
        (
            name,
            f"{eager[name] / 1e9:.2f}",
            f"{fused[name] / 1e9:.2f}",
            f"{1000 * eager[name] / rate:.2f}",
            f"{1000 * fused[name] / rate:.2f}",
        )
        for name in eager
    ]
    per_image = made.work.config.train.global_batch_images / made.cluster.gpus
    for name in ("gradient accumulation", "clip, optimizer, average"):
        seconds = made.parts[name] / per_image
        gigabytes = f"{seconds * rate / 1e9:.2f}"
        rows.append(
            (
                f"{name} (a step's, spread over its images)",
                gigabytes,
                gigabytes,
                f"{1000 * seconds:.2f}",
                f"{1000 * seconds:.2f}",
            )
        )
    columns = ("operators", "eager GB", "fused GB", "eager ms", "fused ms")
    return Table("Memory-bound operators of the generator, an image", columns, rows)


def memory(made: Estimate) -> Table:
    """GiB of a rank, of the stages that differ most."""
    last = len(made.memory) - 1
    stages = [0] if last == 0 else [0, last]
    fullest = max(range(last + 1), key=lambda i: made.memory[i].peak)
    stages += [fullest] if fullest not in stages else []
    names = list(asdict(made.memory[0]))
    rows = [(name, *(f"{getattr(made.memory[i], name) / GIB:.2f}" for i in stages)) for name in names]
    rows.append(("peak", *(f"{made.memory[i].peak / GIB:.2f}" for i in stages)))
    gpu = made.cluster.gpu
    note = (
        f"A {gpu.name.upper()} has {gpu.memory_bytes / GIB:.0f} GiB, of which {gpu.reserve_bytes / GIB:.1f} "
        "are set aside for the CUDA context, NCCL's buffers and fragments."
    )
    return Table("Memory of a rank, GiB", ("item", *(f"stage {i}" for i in stages)), rows, [note])


def traffic(made: Estimate) -> Table:
    """What the busiest stage's ranks send in a step."""
    rows = [
        (t.name, f"{t.bytes / 1e9:.2f}", f"{1000 * t.seconds:.1f}", t.hidden_behind or "nothing")
        for t in made.transfers
    ]
    gpu = made.cluster.gpu
    note = (
        f"NVLink {gpu.nvlink / 1e9:.0f} GB/s each way, network {made.cluster.network / 1e9:.0f} GB/s a GPU, "
        "of both 80 %."
    )
    return Table("Communication of a step", ("traffic", "GB sent", "ms", "behind"), rows, [note])


def step(made: Estimate) -> Table:
    """Where the seconds go."""
    rows = [
        (name, f"{1000 * seconds:.1f}", f"{seconds / made.seconds:.1%}")
        for name, seconds in made.parts.items()
    ]
    rows.append(("sum", f"{1000 * made.seconds:.1f}", ""))
    parallel, size = made.work.config.parallel, made.work.config.train.micro_batch_images
    layout = describe(parallel, size)
    note = f"Layout: {layout}; {made.replicas} data-parallel ranks, {made.micro_batches} micro-batches each."
    return Table("A step on its slowest stage", ("part", "ms", "share"), rows, [note])


def outcome(made: Estimate, fitted: Efficiency, images: float, price: float | None) -> Table:
    """Rates, hours and money, at the fitted factor and at the extremes of the calibration runs."""
    low, high = calibration.spread()
    columns = ("", "slowest run's factor", "fitted", "fastest run's factor")
    factors = (low, fitted, high)
    rates = [made.images_per_s if f is fitted else _rate(made, fitted, f) for f in factors]
    hours = [images / rate / 3600 for rate in rates]
    rows: list[Sequence[str]] = [
        ("system factor", *(f"{f.system:.3f}" for f in factors)),
        ("images/s of one GPU", *(f"{rate:.1f}" for rate in rates)),
        ("model FLOP utilisation", *(f"{made.mfu * rate / made.images_per_s:.1%}" for rate in rates)),
        ("seconds a step", *(f"{made.seconds * made.images_per_s / rate:.3f}" for rate in rates)),
        (f"GPU-hours for {images / 1e6:,.0f} M images", *(f"{hour:,.0f}" for hour in hours)),
        ("days", *(f"{hour / made.cluster.gpus / 24:.2f}" for hour in hours)),
    ]
    if price is not None:
        rows.append((f"cost at {price:g} per GPU-hour", *(f"{hour * price:,.0f}" for hour in hours)))
    return Table("Outcome", columns, rows)


def _rate(made: Estimate, fitted: Efficiency, other: Efficiency) -> float:
    waited = made.parts["communication waited for"]
    seconds = (made.seconds - waited) * fitted.system / other.system + waited
    return made.images_per_s * made.seconds / seconds


def to_data(made: Estimate, tables: Sequence[Table]) -> dict[str, Any]:
    """Plain data: the numbers themselves, and the tables as they were shown."""

    def items(of: Callable[[Item], float]) -> dict[str, float]:
        return {item.name: of(item) for item, _ in made.items}

    return {
        "config": made.work.config.to_dict(),
        "gpu": asdict(made.cluster.gpu),
        "gpus": made.cluster.gpus,
        "data_parallel_ranks": made.replicas,
        "micro_batches": made.micro_batches,
        "step_seconds": made.seconds,
        "images_per_s_per_gpu": made.images_per_s,
        "mfu": made.mfu,
        "peak_bytes": made.peak_bytes,
        "fits": made.fits,
        "cache_bytes_per_image": bytes_per_image(made.work),
        "flops_per_image": items(lambda i: i.flops),
        "moved_bytes_per_image": items(lambda i: i.moved),
        "seconds_per_image": {item.name: seconds for item, seconds in made.items},
        "step_parts_seconds": made.parts,
        "memory_bytes": [asdict(memory) | {"peak": memory.peak} for memory in made.memory],
        "transfers": [asdict(transfer) for transfer in made.transfers],
        "tables": [asdict(table) for table in tables],
    }
