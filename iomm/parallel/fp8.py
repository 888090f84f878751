"""FP8 for the linears of a model: which of them, and what is remembered from step to step.

`fp8.recipe` names the numerics (delayed, current, blockwise), `fp8.keep` the linears that stay in the compute
precision, by weight name. The layers decide what that means: Transformer Engine's multiply in 8 bits, the
local ones emulate it (`iomm.parallel.fp8_emulation`). FP8 is for matrix products only; weights, gradients,
the optimizer and everything between two linears stay as they are.

H steps of history.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iomm.config import Fp8Config
from iomm.parallel import cpu
from iomm.parallel.fp8_emulation import Delayed, Emulation
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@runtime_checkable
class Quantizable(Protocol):
    """A linear that can compute in FP8, whoever's it is."""

    def use_fp8(self, settings: Fp8Config) -> None:
        """From now on."""


@runtime_checkable
class Scaled(Protocol):
    """What has delayed scales."""

    def amax_state(self) -> dict[str, Tensor] | None: ...
    def load_amax_state(self, state: dict[str, Tensor]) -> None: ...


def use_fp8(module: nn.Module, settings: Fp8Config) -> list[str]:
    """Let the linears of `module` compute in FP8, except those that `settings.keep` names.

    Args:
        module: the whole trained part of a rank, since names are matched from there.
    Returns:
        names of the weights concerned; none with `recipe` = none.
    Raises:
        ValueError: `fp8_param`.
    """
    if settings.fp8_param:
        raise ValueError(
            "fp8.fp8_param = true, but the optimizer cannot write 8-bit weights yet. Set "
            "fp8.fp8_param=false: weights are then quantized as they are read."
        )
    if settings.recipe == "none":
        return []
    names = []
    for name, layer in module.named_modules():
        weight = f"{name}.weight"
        if isinstance(layer, Quantizable) and not any(fnmatchcase(weight, p) for p in settings.keep):
            layer.use_fp8(settings)
            names.append(weight)
    if any(isinstance(layer, Emulation) for layer in module.modules()):
        _say(settings.recipe, len(names))
    return names


@functools.cache
def _say(recipe: str, linears: int) -> None:
    logging.getLogger(__name__).warning(
        f"fp8.recipe {recipe} is emulated for {linears} linears: the numbers are those of FP8, the speed and "
        "the memory are not. FP8 itself needs parallel.backend=te."
    )


def fp8_region(
    settings: Fp8Config, config: TransformerConfig, mesh: Mesh
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes the context for one forward pass of a chunk, in which its linears compute in FP8.

    Args:
        config: with which the chunk's layers were made.
    """
    if settings.recipe == "none" or config.transformer_impl == "local":
        return contextlib.nullcontext
    return importlib.import_module("iomm.parallel.te").fp8_region(settings, mesh)


@torch.no_grad()
def finish_fp8_step(module: nn.Module, mesh: Mesh, *, skipped: bool = False) -> None:
    """Move the emulation's delayed scales on; all ranks call it after every optimizer step.

    Transformer Engine moves its own.

    Args:
        skipped: the step's numbers were not finite and changed nothing; they are not recorded either.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Delayed)]
    if not layers:
        return
    running = torch.stack([layer.amax_history_H3[0] for layer in layers])
    if not skipped:
        for group in (mesh.groups.tp, mesh.groups.dp):
            if group.size() > 1:
                dist.all_reduce(running, dist.ReduceOp.MAX, group)
    for layer, amax_3 in zip(layers, running, strict=True):
        if skipped:
            layer.amax_history_H3[0] = 0
        else:
            layer.push(amax_3)


def _scaled(module: nn.Module) -> Iterator[tuple[str, Scaled]]:
    for name, layer in module.named_modules():
        if isinstance(layer, Scaled):
            yield name.removesuffix(".fp8"), layer


def fp8_state(module: nn.Module) -> dict[str, Tensor]:
    """What delayed scaling has to remember, for a checkpoint: `<linear>.amax_history` (H, 3) and
    `<linear>.scale` (3,), fp32, columns input, weight, output gradient.

    The same on all ranks that hold the linear or a part of it, and with both backends. Empty with the other
    recipes. With Transformer Engine: empty before the first step.
    """
    states = ((name, layer.amax_state()) for name, layer in _scaled(module))
    return {f"{name}.{key}": value for name, state in states for key, value in (state or {}).items()}


@torch.no_grad()
def load_fp8_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `fp8_state`. A history of another length is cut or filled up; linears without an entry keep
    what they have, which before the first step is a scale of 1, and the log says how many."""
    keys, missing = ("amax_history", "scale"), 0
    for name, layer in _scaled(module):
        if all(f"{name}.{key}" in state for key in keys):
            layer.load_amax_state({key: state[f"{name}.{key}"] for key in keys})
        elif layer.amax_state() is not None:
            missing += 1
    if missing:
        logging.getLogger(__name__).warning(f"{missing} linears start without a history of FP8 scales.")
