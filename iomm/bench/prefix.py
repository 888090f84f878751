"""`iomm bench prefix`: the frozen-prefix split against the naive full pass (METHOD.md, "The frozen prefix is
free").

By FLOPs, with P prefix positions and Q queries, the naive pass runs P + Q rows forward and their input
gradients backward, 2 (P + Q); the split runs P rows forward and Q rows both ways, P + 2 Q. It also keeps no
activations of the P rows.
"""

import json

from iomm.bench.condition import QUERIES, compare, device_name, random_mllm, random_prefix, training_pass


def bench_prefix(width: int, layers: int, batch: int, repeats: int) -> str:
    """Time and peak memory of forward and backward through adapter and MLLM, as a table and a line of JSON.

    Raises:
        ValueError: a width that is not a multiple of 64, or sizes below 1.
    """
    mllm = random_mllm(width, layers)
    prefix = random_prefix(mllm, batch)
    passes = {
        name: training_pass(mllm, lambda: prefix, split)
        for name, split in (("naive", False), ("split", True))
    }
    found = compare(passes, repeats, mllm.device)
    rows = prefix.c_BPD.shape[1]
    record = {
        "bench": "prefix",
        "device": device_name(mllm.device),
        "width": width,
        "layers": layers,
        "batch": batch,
        "prefix": rows,
        "queries": QUERIES,
        "time_ms": found.time_ms,
        "peak_mib": found.peak_mib,
        "time_ratio": found.time_ms["naive"] / found.time_ms["split"],
        "peak_ratio": found.peak_mib["naive"] / found.peak_mib["split"],
        "predicted_time_ratio": 2 * (rows + QUERIES) / (rows + 2 * QUERIES),
    }
    lines = found.lines(f"forward and backward, batch {batch}, prefix {rows}, queries {QUERIES}")
    lines.append(
        f"split is {record['time_ratio']:.2f}x faster (by FLOPs {record['predicted_time_ratio']:.2f}x) "
        f"and needs {record['peak_ratio']:.2f}x less memory above the weights"
    )
    return "\n".join((*lines, json.dumps(record), ""))
