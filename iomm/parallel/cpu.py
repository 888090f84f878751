"""Megatron-Core on a machine with no GPU: one place maps its CUDA assumptions to the CPU.

Megatron-Core 0.19 asks for `device="cuda"`, streams and `torch.cuda.*Tensor` by name even on gloo.
`prepare()` answers inside Megatron's own modules and nowhere else: the name `torch` there becomes a stand-in
that forwards everything to the real torch except the CUDA device. torch itself stays as it is, so anybody
else's `device="cuda"` still fails as it must.

Four things cannot be reached that way, each patched where it stands:
- `tensor.type() == "torch.cuda.FloatTensor"` compares with a constant: the constants of those functions are
  rewritten.
- setting the CUDA generator's state goes through torch's C library: the function is replaced in Megatron's
  module.
- without apex and Transformer Engine the optimizers fall back to torch's AdamW, which steps weight by weight:
  `iomm.parallel.adam.Adam` is three times as fast and keeps apex's contract.
- two collectives are bound at import by names that torch 2.14 warns about at every run; they get the new
  ones.

With a GPU `prepare()` does nothing.
"""

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from iomm.parallel.adam import Adam

# The modules of Megatron-Core that the local layers, DDP, the optimizers and torch_dist checkpoints use.
_MODULES = (
    "parallel_state",
    "utils",
    "tensor_parallel.random",
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "distributed.param_and_grad_buffer",
    "distributed.distributed_data_parallel",
    "distributed.finalize_model_grads",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "transformer.module",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
)
# Megatron imports these inside functions, where their warnings would come up in the middle of a run.
_IMPORTED_LATE = ("models.mimo.model.base", "transformer.multi_token_prediction")
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)

_CPU = torch.device("cpu")
_prepared = False


def prepare() -> None:
    """Make Megatron-Core usable without a GPU; idempotent, and nothing at all where torch sees one.

    Call before anything else imports `megatron`.
    """
    global _prepared
    if _prepared or torch.cuda.is_available():
        return
    # Transformer Engine needs a GPU to build a layer. None makes `import transformer_engine` fail cleanly, so
    # that Megatron takes its local implementations also where a wheel of it happens to be installed.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    stand_in = _torch_without_cuda()
    modules = _import_megatron()
    for module in modules.values():
        if getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = stand_in
    modules["tensor_parallel.random"].__dict__["_set_cuda_rng_state"] = _set_rng_state
    _accept_cpu_tensors(modules)
    _use_our_adam(modules["optimizer.distrib_optimizer"])
    _use_present_names_of_collectives(modules)
    _prepared = True


def _import_megatron() -> dict[str, types.ModuleType]:
    # Importing Megatron warns about its own deprecated names and that it falls back to torch's optimizers (it
    # gets ours); torch logs that a CUDA toolkit without a GPU is installed. Nothing a user could act on.
    extension_log = logging.getLogger("torch.utils.cpp_extension")
    level = extension_log.level
    extension_log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {name: importlib.import_module(f"megatron.core.{name}") for name in _MODULES}
        for name in _IMPORTED_LATE:
            importlib.import_module(f"megatron.core.{name}")
    extension_log.setLevel(level)
    return modules


class _Event:
    """A CUDA event where there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    """A CUDA stream on which everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Forward(types.ModuleType):
    """A module that answers what it holds itself and forwards the rest to `target`."""

    def __init__(self, target: types.ModuleType, own: dict[str, Any]) -> None:
        super().__init__(target.__name__)
        self.__dict__["_target"] = target
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _torch_without_cuda() -> types.ModuleType:
    """`torch` as Megatron's modules shall see it: the device "cuda" is the CPU, its streams are empty."""
    random = _Forward(torch.cuda.random, {"get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state})
    cuda = _Forward(
        torch.cuda,
        {
            "current_device": lambda: _CPU,
            "set_device": lambda *_: None,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "Stream": _Stream,
            "Event": _Event,
            "current_stream": lambda *_: _Stream(),
            "stream": lambda *_: contextlib.nullcontext(),
            "manual_seed": torch.default_generator.manual_seed,
            "get_rng_state": _get_rng_state,
            "set_rng_state": _set_rng_state,
            "random": random,
        },
    )
    return _Forward(torch, {"cuda": cuda} | {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _accept_cpu_tensors(modules: dict[str, types.ModuleType]) -> None:
    optimizer = modules["optimizer.optimizer"].Float16OptimizerWithFloat16Params
    distributed = modules["optimizer.distrib_optimizer"].DistributedOptimizer
    functions = (
        optimizer.__init__,
        distributed.__init__,
        distributed._build_model_and_main_param_groups.__func__,
    )
    for function in functions:
        code = function.__code__
        function.__code__ = code.replace(co_consts=tuple(_without_cuda(c) for c in code.co_consts))


def _without_cuda(constant: Any) -> Any:
    if isinstance(constant, tuple):
        return tuple(_without_cuda(c) for c in constant)
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        return constant.replace("torch.cuda.", "torch.")
    return constant


def _use_our_adam(distrib_optimizer: types.ModuleType) -> None:
    optimizer = importlib.import_module("megatron.core.optimizer")
    optimizer.__dict__.update(Adam=Adam, USING_PYTORCH_OPTIMIZER=False)
    distrib_optimizer.__dict__.update(Adam=Adam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def _use_present_names_of_collectives(modules: dict[str, types.ModuleType]) -> None:
    renamed = {
        "dist_all_gather_func": "all_gather_single",
        "dist_reduce_scatter_func": "reduce_scatter_single",
    }
    for module in modules.values():
        for bound, name in renamed.items():
            if hasattr(module, bound) and hasattr(torch.distributed, name):
                module.__dict__[bound] = getattr(torch.distributed, name)
