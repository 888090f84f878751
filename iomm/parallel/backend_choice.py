"""Whose layers a run gets, and why: Megatron-Core's own (`local`) or Transformer Engine's (`te`)."""

import functools
import importlib
import importlib.util
import logging
from typing import Literal

import torch

from iomm.config import ParallelConfig

Backend = Literal["local", "te"]

INSTALL = "pip install -e '.[cuda]'"
# Transformer Engine comes in three packages, of which a part alone does not even import.
_PACKAGES = ("transformer_engine", "transformer_engine_torch")


def choose_backend(parallel: ParallelConfig, dtype: torch.dtype) -> Backend:
    """The backend that `parallel.backend` means here for parameters of `dtype`; logged once.

    Raises:
        ValueError: te was asked for and cannot be used; the message says why and what helps.
    """
    if parallel.backend == "local":
        return "local"
    missing = te_missing(dtype)
    if parallel.backend == "te" and missing is not None:
        raise ValueError(f"parallel.backend = te, but {missing}. Or set parallel.backend=local.")
    _say(parallel.backend, missing)
    return "te" if missing is None else "local"


@functools.cache
def _say(asked: str, missing: str | None) -> None:
    if asked == "auto":
        why = "a GPU and Transformer Engine are here" if missing is None else missing
        chosen = "te" if missing is None else "local"
        logging.getLogger(__name__).info(f"parallel.backend auto: {chosen}, because {why}")


def te_missing(dtype: torch.dtype) -> str | None:
    """Why Transformer Engine's layers cannot be used, and what helps; None if they can."""
    if dtype == torch.float64:
        return "Transformer Engine has no fp64; set train.precision=bf16 or fp32"
    if not torch.cuda.is_available():
        return "Transformer Engine needs a GPU that torch can use, and there is none"
    if not all(importlib.util.find_spec(name) for name in _PACKAGES):
        return f"Transformer Engine is not installed; {INSTALL}"
    return _import_error()


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # a library missing, or one built for another torch
        return f"Transformer Engine does not import ({error}); install it anew: {INSTALL}"
    return None


def fuses_gradients(backend: Backend) -> bool:
    """Whether a linear's backward pass adds to the gradient buffer itself, in fp32, instead of handing a
    gradient over that is then added: Transformer Engine can, Megatron's own layers with NVIDIA's apex."""
    if backend == "te":
        return True
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return apex and torch.cuda.is_available()
