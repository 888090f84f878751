"""`iomm bench mask`: what the mask modes cost in the frozen MLLM (METHOD.md, "Three mask modes").

Prefix and query rows, forward and backward. `zero` and `hide` run every prefix position; `drop` runs the
positions that are left, and packing them is part of its time. By FLOPs of the linears, with P prefix
positions of which a share is left, drop's prefix costs that share; the Q query rows cost the same in all
modes.
"""

import dataclasses
import json

import torch

from iomm.bench.condition import (
    PATCH_TOKENS,
    QUERIES,
    TEXT_TOKENS,
    compare,
    device_name,
    random_mllm,
    random_prefix,
    training_pass,
)
from iomm.conditioning.mask import keep_tokens
from iomm.conditioning.prefix import PackedPrefix
from iomm_kernels.pack_tokens import pack_tokens


def bench_mask(mask_ratio: float, width: int, layers: int, batch: int, repeats: int) -> str:
    """Time and peak memory of each mask mode, as a table and a line of JSON.

    Raises:
        ValueError: a width that is not a multiple of 64, a ratio outside [0, 1], or sizes below 1.
    """
    if not 0 <= mask_ratio <= 1 or batch < 1:
        raise ValueError(f"mask ratio {mask_ratio} must lie in [0, 1], and batch {batch} be at least 1.")
    mllm = random_mllm(width, layers)
    whole = random_prefix(mllm, batch)
    keep_BN = keep_tokens(0, torch.arange(batch), PATCH_TOKENS, mask_ratio).to(mllm.device)
    text_BA = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=mllm.device)
    hidden = dataclasses.replace(whole, attend_BP=torch.cat((text_BA, keep_BN), dim=1))
    count_B, left = text_BA.sum(1), int(hidden.attend_BP.sum())

    def dropped() -> PackedPrefix:
        text_BAD, patch_BND = whole.c_BPD.split((TEXT_TOKENS, PATCH_TOKENS), dim=1)
        packed = pack_tokens(text_BAD, count_B, patch_BND, keep_BN, left)
        return PackedPrefix(packed, whole.position_BPA, whole.length_B, mllm.width)

    passes = {
        "zero": training_pass(mllm, lambda: whole),
        "hide": training_pass(mllm, lambda: hidden),
        "drop": training_pass(mllm, dropped),
    }
    found = compare(passes, repeats, mllm.device)
    rows = {"hide": whole.c_BPD.shape[1], "drop": left / batch}
    record = {
        "bench": "mask",
        "device": device_name(mllm.device),
        "mask_ratio": mask_ratio,
        "width": width,
        "layers": layers,
        "batch": batch,
        "prefix": rows,
        "queries": QUERIES,
        "time_ms": found.time_ms,
        "peak_mib": found.peak_mib,
        "time_ratio": found.time_ms["hide"] / found.time_ms["drop"],
        "peak_ratio": found.peak_mib["hide"] / found.peak_mib["drop"],
        "predicted_time_ratio": (rows["hide"] + 2 * QUERIES) / (rows["drop"] + 2 * QUERIES),
    }
    lines = found.lines(f"forward and backward, batch {batch}, mask ratio {mask_ratio}, queries {QUERIES}")
    lines.append(
        f"drop runs {rows['drop']:.1f} of {rows['hide']} prefix positions a sample: "
        f"{record['time_ratio']:.2f}x faster than hide (by FLOPs {record['predicted_time_ratio']:.2f}x), "
        f"{record['peak_ratio']:.2f}x less memory"
    )
    return "\n".join((*lines, json.dumps(record), ""))
