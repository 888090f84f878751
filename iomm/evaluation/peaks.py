"""What accelerators can do at most, by the name that their driver gives, and how much of it a run uses."""

# Dense bf16 FLOP/s from NVIDIA's data sheets. An accelerator that is not here gets no MFU.
PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H200": 989e12,
}


def mfu(tflops: float, device: str, ranks: int, precision: str) -> float | None:
    """Model FLOPs utilisation: what the model needs against what the accelerators could do in bf16.

    Work that is done twice (recomputation) does not count, nor does FP8 raise the peak.

    Args:
        tflops: TFLOP/s of the whole job, as logged.
        device: as run.json has it.
        ranks: one accelerator each.
        precision: `train.precision`.
    Returns:
        A share of 1; None where the peak is not known, or is not that of the precision.
    """
    peak = PEAK_BF16_FLOPS.get(device)
    return None if peak is None or precision != "bf16" or not tflops else tflops * 1e12 / (ranks * peak)
