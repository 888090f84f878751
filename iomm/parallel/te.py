"""The layers of `iomm.parallel.backend` from Transformer Engine, and its FP8. Not yet run on a GPU.

Written against Transformer Engine 2.20: constructed under a pretended device, never computed with. Import it
only where `backend_choice` says that it can be used.

Its own classes rather than Megatron's wrappers of them: those look process groups up in Megatron's global
state, replace parameters that they initialise themselves, and give their output as half of a pair.

FP8 in a linear needs inputs and outputs that are multiples of 16, and tokens (length times batch) a multiple
of 8; Transformer Engine says so otherwise.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, final

import torch
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.common import recipe as te_recipe  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
    FP8GlobalStateManager,
)

from iomm.config import Fp8Config
from iomm.parallel.fp8_emulation import resized
from iomm.parallel.mesh import Mesh


def recipe(settings: Fp8Config) -> Any:
    """Transformer Engine's recipe of this name, with its own formats: E4M3, and E5M2 for the gradients of the
    recipes with one scale a tensor."""
    if settings.recipe == "delayed":
        return te_recipe.DelayedScaling(margin=settings.margin, amax_history_len=settings.amax_history)
    if settings.recipe == "current":
        return te_recipe.Float8CurrentScaling()
    assert settings.recipe == "blockwise", settings.recipe
    return te_recipe.Float8BlockScaling()


def check_fp8(settings: Fp8Config) -> None:
    """
    Raises:
        ValueError: this GPU, its CUDA or its cuBLAS has no such products.
    """
    ask = te.is_fp8_block_scaling_available if settings.recipe == "blockwise" else te.is_fp8_available
    usable, reason = ask(return_reason=True)
    if not usable:
        raise ValueError(
            f"fp8.recipe = {settings.recipe}, but {reason} Set fp8.recipe=none, or parallel.backend=local, "
            "which emulates it."
        )


def fp8_region(settings: Fp8Config, mesh: Mesh) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes the context for one forward pass of a chunk: linears that `use_fp8` multiply in 8 bits inside.

    Delayed scales move when the outermost region is left, and in the backward pass. Their amax is taken over
    all ranks that hold the chunk: tensor and data parallel.
    """
    made, group = recipe(settings), mesh.groups.tp_dp_cp
    return lambda: te.autocast(enabled=True, recipe=made, amax_reduction_group=group)


@final
class Linear(te.Linear):
    """`local.Column`, `local.Row` and `local.Replicated` in one.

    Args:
        split: "column", "row", or None for a linear that all tensor-parallel ranks compute in full.
    """

    get_extra_state = (
        nn.Module.get_extra_state
    )  # no pickled `_extra_state` among the weights: see `amax_state`
    set_extra_state = nn.Module.set_extra_state

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        config: TransformerConfig,
        mesh: Mesh,
        split: Literal["column", "row"] | None,
    ) -> None:
        super().__init__(
            in_size,
            out_size,
            bias=bias,
            parallel_mode=split,
            sequence_parallel=config.sequence_parallel and split is not None,
            tp_group=None if split is None else mesh.groups.tp,
            params_dtype=config.params_dtype,
            device=str(torch.get_default_device()),  # "meta" is compared as text
            init_method=_leave,
            fuse_wgrad_accumulation=config.gradient_accumulation_fusion,
        )
        self._in_fp8 = False
        _mark(self.weight, split is not None, 1 if split == "row" else 0)
        if bias:
            _mark(self.bias, split == "column", 0)

    def use_fp8(self, settings: Fp8Config) -> None:
        """From now on, inside a `fp8_region`."""
        check_fp8(settings)
        self._in_fp8 = True
        if settings.recipe == "delayed":
            # As its own loading of a checkpoint does: the tensors have to be there before the first step.
            self.fp8_meta.update(num_gemms=1, recipe=recipe(settings))
            self.init_fp8_meta_tensors(self.fp8_meta["recipe"])

    def forward(self, x: Tensor) -> Tensor:
        if self._in_fp8 or not FP8GlobalStateManager.is_fp8_enabled():
            return super().forward(x)
        with te.autocast(enabled=False, recipe=FP8GlobalStateManager.get_fp8_recipe()):
            return super().forward(x)

    def amax_state(self) -> dict[str, Tensor] | None:
        """Copies of `amax_history` (H, 3) and `scale` (3,): input, weight, output gradient. None without
        delayed scales."""
        scales = self._delayed_scales()
        if scales is None:
            return None
        forward, backward = scales
        history = torch.cat((forward.amax_history[:, :2], backward.amax_history[:, :1]), 1)
        return {"amax_history": history, "scale": torch.cat((forward.scale[:2], backward.scale[:1]))}

    def load_amax_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `amax_state`; of a history of another length the newest steps are kept."""
        scales = self._delayed_scales()
        if scales is None:
            return
        forward, backward = scales
        history_H3 = resized(state["amax_history"], len(forward.amax_history))
        # Quantizers hold views of these tensors: filled in place.
        forward.amax_history[:, :2].copy_(history_H3[:, :2])
        backward.amax_history[:, :1].copy_(history_H3[:, 2:])
        forward.scale[:2].copy_(state["scale"][:2])
        backward.scale[:1].copy_(state["scale"][2:])

    def _delayed_scales(self) -> tuple[Any, Any] | None:
        """What holds the scales of input, weight, output, and those of the gradients of output and input."""
        found = tuple(self.fp8_meta.get(key) for key in ("scaling_fwd", "scaling_bwd"))
        delayed = all(hasattr(scales, "amax_history") for scales in found)
        return found if delayed else None  # pyright: ignore[reportReturnType]


def checkpoint(block: nn.Module, *args: Any) -> Any:
    """`Layers.checkpoint`: the second forward pass sees the first one's FP8 context and scales."""
    return te.checkpoint(block, *args, use_reentrant=False)


def _leave(weight: Tensor) -> None:
    """Weights are initialised by name, later."""


def _mark(weight: nn.Parameter, split: bool, axis: int) -> None:
    """Say how a weight lies over the tensor-parallel ranks, as Megatron's own layers do. Transformer Engine
    marks its linears' weights as split always, and says nothing of those on the meta device."""
    marks = {"tensor_model_parallel": split, "partition_dim": axis if split else -1, "partition_stride": 1}
    for name, value in marks.items():
        setattr(weight, name, value)


@final
class Attention(nn.Module):
    """Attention of whole heads: cuDNN's or flash-attn's kernels, whichever Transformer Engine ranks first."""

    def __init__(self, heads_on_rank: int, head_size: int) -> None:
        super().__init__()
        # Outside of the module tree: it has no weights, and its `_extra_state` is none.
        self._attend = (te.DotProductAttention(heads_on_rank, head_size, attn_mask_type="no_mask"),)

    def forward(self, q_LBHK: Tensor, k_SBHK: Tensor, v_SBHK: Tensor) -> Tensor:
        """-> (L, B, H * K). Every query attends to every key."""
        return self._attend[0](q_LBHK, k_SBHK, v_SBHK, attn_mask_type="no_mask")
