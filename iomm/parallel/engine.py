"""One optimizer step: forward and backward over micro-batches, gradient sum over ranks, clip, AdamW, EMA.

The work is Megatron-Core's: DistributedDataParallel keeps one gradient buffer and reduces it over the
data-parallel ranks, the (distributed) optimizer keeps fp32 masters and moments, the schedule runs the
micro-batches. What is ours is the order of events and one rule: a step whose loss or gradient norm is not
finite on any rank changes nothing on any rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from iomm.config import OptimizerConfig, ParallelConfig, TrainConfig
from iomm.parallel import cpu
from iomm.parallel.ema import Ema
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from iomm.parallel.weights import named_weights, sharded  # noqa: E402

# How Megatron lays the optimizer state out in a checkpoint: by parameter, independent of the number of ranks.
_STATE_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}

# forward(module, micro_batch) -> (scalar loss, scalars for the log). Every call returns the same names.
Forward = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did; the same on every rank."""

    loss: float  # mean over micro-batches and data-parallel ranks
    grad_norm: float  # global, before clipping
    lr: float
    skipped: bool  # loss or gradient norm was NaN or Inf on some rank: nothing was changed
    metrics: dict[str, float]  # means, like the loss


@final
class Engine:
    """Steps the weights of one module.

    Args:
        module: any `nn.Module`; parameters with `requires_grad=False` are left alone. Moved to the mesh's
            device.
        transformer_config: the one its layers were made with.
        optimizer: learning rate, betas, clipping, EMA. Biases and other vectors get no weight decay.
        train: number of steps and precision.
        parallel: whether the optimizer state is sharded over the data-parallel ranks.
        mesh: where this rank stands.

    Raises:
        ValueError: fp64 with the distributed optimizer; EMA of bf16 weights with the distributed optimizer; a
            cosine schedule whose warm-up leaves no step; a module without trainable parameters.
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
        _check(module, optimizer, train, parallel)
        self.module = module.to(mesh.device)
        self.mesh = mesh
        self.steps_done = 0
        self._clip_norm = optimizer.clip_norm
        self._ddp = _wrap(self.module, transformer_config, train, parallel, mesh)
        self._optimizer = _optimizer(self._ddp, optimizer, train, parallel, mesh)
        self._scheduler = _scheduler(self._optimizer, optimizer, train)
        self._forward_backward = get_forward_backward_func(pp_size=1, vp_size=None)
        self.ema = None
        if optimizer.ema_decay is not None:
            self.ema = Ema(self.module, _masters(self.module), optimizer.ema_decay)

    def step(self, forward: Forward, micro_batches: Iterable[Any], num_micro_batches: int) -> StepResult:
        """Train on this rank's part of one global batch.

        Args:
            forward: computes the loss of one micro-batch with the module.
            micro_batches: at least `num_micro_batches` of them, this rank's.
            num_micro_batches: how many make the step.

        Raises:
            ValueError: fewer micro-batches came, or the names of the metrics differ between them.
        """
        lr = self._set_lr()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss, metrics = self._average(self._run(forward, iter(micro_batches), num_micro_batches))
        grad_norm = self._grad_norm()
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            self._update(grad_norm)
        self.steps_done += 1
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, skipped=skipped, metrics=metrics)

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Everything a checkpoint holds of the engine, as Megatron's sharded state dict. All ranks call."""
        weights = named_weights(self.module)
        state: dict[str, Any] = {"model": sharded(weights, weights, "model.", self.mesh)}
        metadata = _STATE_FORMAT | {"dp_cp_group": self.mesh.groups.dp_cp}
        state["optimizer"] = self._optimizer.sharded_state_dict(
            {"model": state["model"]}, is_loading=loading, metadata=metadata
        )
        if self.ema is not None:
            state["ema"] = sharded(self.ema.weights, weights, "ema.", self.mesh)
        state["steps_done"] = self.steps_done
        return state

    @torch.no_grad()
    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Inverse of `sharded_state`, of the same layout and settings, once its tensors are filled."""
        for name, weight in named_weights(self.module).items():
            weight.copy_(state["model"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            for name, average in self.ema.weights.items():
                average.copy_(state["ema"][name])
        self.steps_done = state["steps_done"]

    def _set_lr(self) -> float:
        # The schedule is a function of the step number, so it has no state of its own. The first step is
        # number 1.
        self._scheduler.num_steps = self.steps_done + 1
        self._scheduler.step(0)
        return self._optimizer.param_groups[0]["lr"]

    def _run(self, forward: Forward, micro_batches: Iterator[Any], count: int) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch, gradients summed over ranks; the logged scalars of
        each."""
        none_left = object()

        def forward_step(batches: Iterator[Any], _: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro_batch = next(batches, none_left)
            if micro_batch is none_left:
                raise ValueError(f"micro_batches ended early: num_micro_batches is {count}.")
            loss, metrics = forward(self.module, micro_batch)
            logged = {name: value.detach().clone() for name, value in {"loss": loss, **metrics}.items()}
            # The schedule divides the loss by the number of micro-batches in place: give it a copy.
            return loss.clone(), lambda scaled: (scaled, logged)

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=micro_batches,
            model=self._ddp,
            num_microbatches=count,
            seq_length=1,  # of pipeline buffers, of which there are none
            micro_batch_size=1,
            pg_collection=self.mesh.groups,
        )

    def _average(self, logged: list[dict[str, Tensor]]) -> tuple[float, dict[str, float]]:
        """Mean over micro-batches and data-parallel ranks, in one message."""
        names = list(logged[0])
        if any(list(entry) != names for entry in logged):
            raise ValueError(f"metrics differ between micro-batches: {[list(entry) for entry in logged]}.")
        values = torch.stack([torch.stack([e[name].double() for name in names]) for e in logged]).mean(0)
        means = dict(zip(names, self.mesh.mean_over_dp(values).tolist(), strict=True))
        return means.pop("loss"), means

    def _grad_norm(self) -> float:
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    @torch.no_grad()
    def _update(self, grad_norm: float) -> None:
        scale = self._clip_norm / (grad_norm + 1e-6)
        if self._clip_norm > 0 and scale < 1:
            torch.ops.aten._foreach_mul_.Scalar(
                [p.grad for p in self._optimizer.get_parameters() if p.grad is not None], scale
            )
        self._optimizer.step_with_ready_grads()
        if self.ema is not None:
            self.ema.update()


@final
class _Chunk(MegatronModule):
    """What Megatron's schedules expect of a model, around any module."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, module: nn.Module) -> None:
        super().__init__(config)
        self.module = module

    def set_input_tensor(self, _: Any) -> None:
        """Without pipeline stages nothing comes from a stage before."""


def _check(
    module: nn.Module, optimizer: OptimizerConfig, train: TrainConfig, parallel: ParallelConfig
) -> None:
    if train.precision == "fp64" and parallel.distributed_optimizer:
        raise ValueError(
            "train.precision = fp64 does not work with Megatron's distributed optimizer, which keeps "
            "fp32 masters. Set parallel.distributed_optimizer=false."
        )
    if train.precision == "bf16" and parallel.distributed_optimizer and optimizer.ema_decay is not None:
        raise ValueError(
            "EMA with bf16 needs parallel.distributed_optimizer=false: it reads the whole fp32 masters. "
            "Set that, or optimizer.ema_decay=null."
        )
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= train.steps:
        raise ValueError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} leaves no step of the {train.steps} of "
            "train.steps for the cosine. Lower the warm-up, or set optimizer.schedule=constant."
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("the module has no trainable parameter. Check which parts are frozen.")


def _wrap(
    module: nn.Module, config: TransformerConfig, train: TrainConfig, parallel: ParallelConfig, mesh: Mesh
) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        grad_reduce_in_fp32=train.precision == "bf16",
        overlap_grad_reduce=mesh.device.type == "cuda" and mesh.world_size > 1,
    )
    layout = None
    if parallel.distributed_optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        layout = DistributedOptimizer.compute_full_param_layout(trained, None, mesh.dp_size, settings)
    ddp = DistributedDataParallel(
        config, settings, _Chunk(config, module), pg_collection=mesh.groups, full_param_layout=layout
    )
    # A single rank has nothing to reduce; gloo would copy the whole gradient buffer three times to find that
    # out.
    config.finalize_model_grads_func = finalize_model_grads if mesh.world_size > 1 else None
    config.no_sync_func = ddp.no_sync
    ddp.broadcast_params()
    return ddp


def _optimizer(
    ddp: DistributedDataParallel,
    settings: OptimizerConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
) -> Any:
    config = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_norm,
        bf16=train.precision == "bf16",
        params_dtype=DTYPES[train.precision],
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    # Without no_grad the distributed optimizer's shards of fp32 weights are graph nodes, and torch warns at
    # every step.
    with torch.no_grad():
        built: Any = megatron_optimizer.get_megatron_optimizer(
            config, [ddp], pg_collection=mesh.groups, use_gloo_process_groups=False
        )
    for part in built.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)  # so that a checkpoint may precede the first step
        part._defer_param_sync = mesh.world_size == 1  # a single rank has no weights to gather either
    return built


def _scheduler(optimizer: Any, settings: OptimizerConfig, train: TrainConfig) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=min(settings.min_lr, settings.lr),
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(train.steps, settings.warmup_steps + 1),  # a constant schedule never reads it
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
    )


def _masters(module: nn.Module) -> dict[str, Tensor]:
    """The full-precision weights that the optimizer steps: the parameters themselves unless they are bf16."""
    return {name: getattr(p, "main_param", p) for name, p in module.named_parameters() if p.requires_grad}
