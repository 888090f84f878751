"""One optimizer step: forward and backward over micro-batches and pipeline stages, gradient sum over ranks,
clip, AdamW or Muon, EMA.

The work is Megatron-Core's: DistributedDataParallel keeps one gradient buffer a chunk and reduces it over the
data-parallel ranks, the (distributed) optimizer keeps fp32 masters and moments, the schedule runs the
micro-batches. What is ours is the order of events and one rule: a step whose loss or gradient norm is not
finite on any rank changes nothing on any rank.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel

from iomm.config import OptimizerConfig, ParallelConfig, TrainConfig
from iomm.parallel import cpu, muon
from iomm.parallel.ema import Ema
from iomm.parallel.fp8 import finish_fp8_step, fp8_state, load_fp8_state
from iomm.parallel.masters import copy_boxes, sharded_pieces, state_tensors
from iomm.parallel.mesh import Mesh
from iomm.parallel.optimizer import DTYPES, Optimizer
from iomm.parallel.pipeline import Forward, Pipeline, Stage

cpu.prepare()  # before the first import of Megatron

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from iomm.parallel.weights import named_weights, sharded  # noqa: E402

__all__ = ["DTYPES", "Before", "Engine", "Forward", "StepResult"]

# Called once gradients are zeroed; what it returns is called after the pipeline's backward pass.
Before = Callable[[], Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did; the same on every rank."""

    loss: float  # mean over micro-batches and data-parallel ranks
    grad_norm: float  # global, before clipping
    lr: float  # of weights in no group of `optimizer.groups`
    skipped: bool  # loss or gradient norm was NaN or Inf on some rank: nothing was changed
    metrics: dict[str, float]  # means, like the loss


@final
class Engine:
    """Steps the weights of one rank.

    Args:
        module: what this rank holds. `module.chunks` are its pipeline chunks, each with parameters of
            `module`; `module.shared`, if there, is trained outside the pipeline and the same on all ranks:
            its parameters carry `shared_by_all = True`. A module without `chunks` is one chunk. Parameters
            with `copied_over_tp = True` are trained by each tensor-parallel rank for itself, on the same
            work; those with `requires_grad=False` are left alone. Moved to the mesh's device.
        transformer_config: the one its layers were made with.
        optimizer: AdamW or Muon, learning rates, clipping, EMA. Biases and other vectors get no weight decay.
        train: number of steps and precision.
        parallel: whether the optimizer state is sharded over the data-parallel ranks.
        mesh: where this rank stands.

    Raises:
        ValueError: fp64 with the distributed optimizer; Muon in fp64, or in fp32 with it; a cosine schedule
            whose warm-up leaves no step; a chunk without trainable parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        transformer_config: TransformerConfig,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
    ) -> None:
        _check(optimizer, train, parallel)
        self.module = module.to(mesh.device)
        self.mesh = mesh
        self.steps_done = 0
        self.updates_done = 0  # steps that were not skipped
        # Entered around the sum of gradients, where ranks wait for each other; for whoever measures it.
        self.while_summing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self._attention = _attention(mesh, transformer_config)
        self._clip_norm = optimizer.clip_norm
        names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        if optimizer.kind == "muon":
            head_size = transformer_config.hidden_size // transformer_config.num_attention_heads
            muon.mark(names, head_size, sharded=parallel.distributed_optimizer)
        wrap = _Wrapper(transformer_config, optimizer, train, parallel, mesh)
        self.pipeline = Pipeline(getattr(module, "chunks", [module]), transformer_config, mesh, wrap.chunk)
        self._shared = None
        shared: nn.Module | None = getattr(module, "shared", None)
        if shared is not None and any(p.requires_grad for p in shared.parameters()):
            self._shared = wrap.shared(shared)
        self._copies = [p for p in names if getattr(p, "copied_over_tp", False)]
        self._set_hooks(transformer_config)
        self._optimizer = Optimizer(
            self.pipeline.models, self._shared, names, optimizer, train, parallel, mesh
        )
        self.ema = None
        if optimizer.ema_decay is not None:
            self.ema = Ema(self._optimizer.pieces, optimizer.ema_decay, self._optimizer.gather_weights)

    def step(
        self, forward: Forward, micro_batches: Sequence[Any], before: Before | None = None
    ) -> StepResult:
        """Train on this rank's part of one global batch.

        Args:
            forward: one chunk's work for one micro-batch.
            micro_batches: this data-parallel rank's, the same number on all ranks.
            before: the shared part's work ahead of the pipeline; it returns the shared part's backward pass.

        Raises:
            ValueError: no micro-batch, or a number that the schedule cannot take; or the names of the metrics
                differ between micro-batches.
        """
        lr = self._optimizer.set_lr(self.steps_done + 1)
        self._optimizer.zero_grad()
        with self._attention():
            after = before() if before is not None else None
            logged = self.pipeline.run(forward, micro_batches)
            if after is not None:
                after()
        self._reduce_shared()
        loss, metrics = self._average(logged)
        self._optimizer.prepare_grads()
        grad_norm = self._optimizer.grad_norm()
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            self._update(grad_norm)
        finish_fp8_step(self.module, self.mesh, skipped=skipped)
        self.steps_done += 1
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, skipped=skipped, metrics=metrics)

    def sharded_state(self) -> dict[str, Any]:
        """Everything a checkpoint holds of the engine, as a sharded state dict. All ranks call.

        Tensors go by the names of weights, so that layout, number of optimizers and their sharding leave no
        trace: `model.NAME`, `ema.NAME`, `optimizer.state.KEY.model.NAME`. A weight that is not on this rank
        is not in the result. The tensors are the live ones, to be written or filled.
        """
        weights, owned = named_weights(self.module), self._optimizer.pieces
        state: dict[str, Any] = {"model": sharded(weights, weights, "model.", self.mesh)}
        state["optimizer"] = {
            key: sharded_pieces(tensors, owned, f"optimizer.state.{key}.model.", self.mesh)
            for key, tensors in state_tensors(owned).items()
        }
        if self.ema is not None:
            state["ema"] = sharded_pieces(self.ema.weights, owned, "ema.", self.mesh)
        if scales := fp8_state(self.module):
            state["fp8"] = sharded(scales, scales, "fp8.", self.mesh)
        return state | {"steps_done": self.steps_done, "updates_done": self.updates_done}

    @torch.no_grad()
    def load_sharded_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `sharded_state`, of the same settings, once its tensors are filled. All ranks call."""
        for name, weight in named_weights(self.module).items():
            weight.copy_(state["model"][name])
        for key, tensors in state_tensors(self._optimizer.pieces).items():
            copy_boxes(tensors, state["optimizer"][key])
        if self.ema is not None:
            copy_boxes(self.ema.weights, state["ema"])
        load_fp8_state(self.module, state.get("fp8", {}))
        self.steps_done, self.updates_done = state["steps_done"], state["updates_done"]
        self._optimizer.set_updates(self.updates_done)

    def _set_hooks(self, config: Any) -> None:
        models = self.pipeline.models
        # A single rank has nothing to reduce; gloo would copy the whole gradient buffer three times to find
        # that out.
        config.finalize_model_grads_func = self._sum_gradients if self.mesh.world_size > 1 else None
        config.no_sync_func = [m.no_sync for m in models] if len(models) > 1 else models[0].no_sync
        for model in (*models, *([self._shared] if self._shared else [])):
            model.broadcast_params()

    def _sum_gradients(self, *args: Any, **settings: Any) -> None:
        """What the schedule calls when this rank's last backward pass is done."""
        with self.while_summing():
            finalize_model_grads(*args, **settings)
            self._average_copies()

    def _average_copies(self) -> None:
        """The same gradient for all copies of a weight: a kernel that sums in any order, as attention's
        backward on a GPU, gives each its own last bits, and they would walk apart."""
        if not self._copies:
            return
        grads = [weight.main_grad for weight in self._copies]  # type: ignore[attr-defined]
        mean = _flatten_dense_tensors(grads)
        dist.all_reduce(mean, group=self.mesh.groups.tp)
        mean /= self.mesh.tp_size
        for grad, same in zip(grads, _unflatten_dense_tensors(mean, grads), strict=True):
            grad.copy_(same)

    def _reduce_shared(self) -> None:
        """Sum the shared part's gradients over the world. They are of the mean loss of one data-parallel rank
        each, spread over its tp * pp ranks, so the mean over the world is too small by that factor."""
        if self._shared is not None:
            if self.mesh.world_size > 1:
                self._shared.finish_grad_sync()
            self._shared.scale_gradients(float(self.mesh.mp_size))

    def _average(self, logged: list[dict[str, Tensor]]) -> tuple[float, dict[str, float]]:
        """Mean over micro-batches and data-parallel ranks, in one message; then to all stages."""
        means: dict[str, float] = {}
        if self.mesh.is_last_stage:
            names = list(logged[0])
            if any(list(entry) != names for entry in logged):
                raise ValueError(f"metrics differ between micro-batches: {[list(e) for e in logged]}.")
            values = torch.stack([torch.stack([e[name].double() for name in names]) for e in logged]).mean(0)
            means = dict(zip(names, self.mesh.mean_over_dp(values).tolist(), strict=True))
        means = self.mesh.object_from_stage(means, self.mesh.pp_size - 1)
        return means.pop("loss"), means

    @torch.no_grad()
    def _update(self, grad_norm: float) -> None:
        scale = self._clip_norm / (grad_norm + 1e-6)
        if self._clip_norm > 0 and scale < 1:
            self._optimizer.scale_grads(scale)
        self._optimizer.step()
        self.updates_done += 1
        if self.ema is not None:
            self.ema.update()


@final
class _Wrapper:
    """Puts Megatron's data parallelism around chunks, and around what all ranks share."""

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
    ) -> None:
        self.config, self.train, self.parallel, self.mesh = config, train, parallel, mesh
        self.overlap = mesh.device.type == "cuda" and mesh.world_size > 1
        self.layout_of = LayerWiseDistributedOptimizer if optimizer.kind == "muon" else DistributedOptimizer

    def chunk(self, stage: Stage, index: int) -> DistributedDataParallel:
        """One chunk, data-parallel over `mesh.groups.dp`."""
        # Later stages and chunks reduce while the first stage still computes: one message will do there.
        bucketed = self.overlap and self.mesh.is_first_stage and index == 0
        return self._wrap(stage, self.mesh.groups, overlap=self.overlap, bucketed=bucketed)

    def shared(self, module: nn.Module) -> DistributedDataParallel:
        """What all ranks hold, data-parallel over the world. Its backward pass may come in several calls, so
        that no gradient is known to be complete before the last: nothing overlaps."""
        stage = Stage(self.config, module, 0, self.mesh)
        return self._wrap(stage, self.mesh.alone, overlap=False, bucketed=False)

    def _wrap(
        self, stage: Stage, groups: ProcessGroupCollection, *, overlap: bool, bucketed: bool
    ) -> DistributedDataParallel:
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=self.parallel.distributed_optimizer,
            grad_reduce_in_fp32=self.train.precision == "bf16",
            overlap_grad_reduce=overlap,
        )
        trained = [p for p in stage.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                "a chunk of the module has no trainable parameter. Check which parts are frozen."
            )
        layout, ranks = None, groups.dp.size()
        if self.parallel.distributed_optimizer:
            bucket = max(40_000_000, 1_000_000 * ranks) if bucketed else None  # Megatron's own sizes
            layout = self.layout_of.compute_full_param_layout(trained, bucket, ranks, settings)
        return DistributedDataParallel(
            self.config,
            settings,
            stage,
            pg_collection=groups,
            full_param_layout=layout,
        )


def _attention(mesh: Mesh, config: TransformerConfig) -> Callable[[], AbstractContextManager[object]]:
    """PyTorch's attention of a training step. Its fused kernel for CPUs is slow backwards in bf16: of 32 x 6
    heads of 64 positions, 31 ms instead of the plain form's 9 (2.14, one core with AMX)."""
    if mesh.device.type == "cpu" and config.params_dtype == torch.bfloat16:
        return lambda: sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext


def _check(optimizer: OptimizerConfig, train: TrainConfig, parallel: ParallelConfig) -> None:
    muon.check(optimizer, train, parallel)
    if train.precision == "fp64" and parallel.distributed_optimizer:
        raise ValueError(
            "train.precision = fp64 does not work with Megatron's distributed optimizer, which keeps "
            "fp32 masters. Set parallel.distributed_optimizer=false."
        )
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= train.steps:
        raise ValueError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} leaves no step of the {train.steps} of "
            "train.steps for the cosine. Lower the warm-up, or set optimizer.schedule=constant."
        )
