"""Muon: the momentum of a hidden matrix, made orthogonal, is its update (METHOD.md section 4).

    m <- beta m + (1 - beta) g                        momentum
    u  = (1 - beta) g + beta m                        Nesterov
    w <- w - lr 0.2 sqrt(max(out, in)) NS(u)          NS: Newton-Schulz, u = USV^T -> about UV^T

The factor 0.2 sqrt(max(out, in)) gives an update the size of AdamW's, so that AdamW's learning rate carries
over ("Muon is scalable for LLM training", arXiv 2502.16982, section 2.2). A fused query-key-value matrix is
three. A matrix split over tensor-parallel ranks is gathered first, so that the layout has no influence.

Muon is for matrices that map hidden vectors to hidden vectors. AdamW keeps the rest:
    vectors                         norms, biases
    where data comes and goes       image_in, condition_in, out; pads and the adapter's queries are embeddings
    time embedding and modulation   they see one vector a sample, so that a gradient has at most the rank of
                                    the batch: orthogonalising it would blow up directions of pure noise

Megatron-Core's `optimizer="muon"` does the work. Sharded (`parallel.distributed_optimizer`), whole matrices
are dealt to data-parallel ranks and AdamW's part is the distributed optimizer's.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from iomm.config import OptimizerConfig, ParallelConfig, TrainConfig
from iomm.parallel import cpu
from iomm.parallel.masters import weights_and_masters

cpu.prepare()  # before the first import of Megatron

from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon  # noqa: E402
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer  # noqa: E402

ADAMW = (
    "generator.image_in.*",
    "generator.condition_in.*",
    "generator.out.*",
    "generator.time.*",
    "generator.guidance.*",
    "generator.pooled.*",
    "generator.*_pad",
    "*modulation*",
    "conditioner.adapter.queries",
)
_LIKE_ADAMW = 0.2  # arXiv 2502.16982, section 2.2


def check(settings: OptimizerConfig, train: TrainConfig, parallel: ParallelConfig) -> None:
    """Refuse what Megatron's Muon cannot do.

    Raises:
        ValueError: fp64; or fp32 with the state sharded.
    """
    if settings.kind != "muon":
        return
    if train.precision == "fp64":
        raise ValueError(
            "optimizer.kind = muon orthogonalises in fp32, train.precision is fp64. Set train.precision=fp32."
        )
    if train.precision == "fp32" and parallel.distributed_optimizer:
        raise ValueError(
            "optimizer.kind = muon with parallel.distributed_optimizer works in bf16 only (Megatron deals "
            "whole matrices to ranks by their fp32 masters). Set parallel.distributed_optimizer=false, or "
            "train.precision=bf16."
        )


def mark(names: Mapping[nn.Parameter, str], head_size: int, *, sharded: bool) -> None:
    """Tell Megatron, by attributes, which matrices are Muon's and which are fused; before they are
    wrapped."""
    for weight, name in names.items():
        if any(fnmatchcase(name, pattern) for pattern in ADAMW):
            weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        if name.endswith("qkv.weight"):
            # The generator's rows run (head, q | k | v, channel), the connector's (q | k | v, head, channel).
            part = head_size if name.startswith("generator.") else weight.shape[0] // 3
            weight.is_qkv, weight.qkv_split_shapes = True, [part] * 3  # type: ignore[attr-defined]
        if sharded:
            managed = is_managed_by_layer_wise_optimizer(weight)
            weight.is_managed_by_layer_wise_optimizer = managed  # type: ignore[attr-defined]


def mark_masters(part: Any) -> None:
    """Let the fp32 masters of fused matrices say so too."""
    if is_muon(part):
        for weight, master in weights_and_masters(part):
            for attribute in ("is_qkv", "qkv_split_shapes"):
                if hasattr(weight, attribute):
                    setattr(master, attribute, getattr(weight, attribute))


def is_muon(part: Any) -> bool:
    """Whether one of Megatron's optimizers is Muon."""
    return isinstance(part.optimizer, TensorParallelMuon)


def megatron_settings(
    settings: OptimizerConfig, train: TrainConfig, parallel: ParallelConfig
) -> dict[str, Any]:
    """Those of Megatron's `OptimizerConfig` that make it Muon."""
    return dict(
        optimizer="muon",
        muon_momentum=settings.muon_momentum,
        muon_nesterov=True,
        muon_num_ns_steps=settings.muon_newton_schulz_steps,
        muon_scale_mode="spectral",  # sqrt(max(out, in))
        muon_extra_scale_factor=_LIKE_ADAMW,
        # Every tensor-parallel rank works on the whole matrix. Alone it has that, and "blockwise", each rank
        # its block, is the same without Megatron's gather in a group of one.
        muon_tp_mode="duplicated" if parallel.tp > 1 else "blockwise",
        muon_split_qkv=True,
        muon_fp32_matmul_prec="medium" if train.precision == "bf16" else "highest",  # medium: bf16 products
        use_layer_wise_distributed_optimizer=parallel.distributed_optimizer,
        use_distributed_optimizer=False,  # of AdamW's part; the layer-wise form turns it on
    )
