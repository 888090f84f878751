"""Activation recomputation: what a block keeps for its backward pass.

    none        everything that autograd saves
    selective   results of matrix products and of attention; what lies between (norm, modulation, rotation,
                activation, gate: cheap in FLOPs, large in bytes) is computed again
    full        the block's inputs; the whole block is computed again

The numbers do not change (arXiv 1604.06174; selective: arXiv 2205.05198 section 5). Between tensor-parallel
ranks both repeat the forward pass's collectives.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from iomm.parallel.backend import Layers

_aten = torch.ops.aten
KEPT_OPERATORS = frozenset(
    (
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,  # attention where no fused operator fits
        _aten.baddbmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
    )
)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = functools.partial(create_selective_checkpoint_contexts, _policy)


def run_block(layers: Layers, block: nn.Module, *args: Any) -> Any:
    """`block(*args)`, of which is kept what the layers' settings say."""
    granularity = layers.config.recompute_granularity
    if granularity is None or not torch.is_grad_enabled():
        return block(*args)
    if granularity == "full":
        return layers.checkpoint(block, *args)
    assert granularity == "selective", granularity
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products)
