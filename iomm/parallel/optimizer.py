"""All the optimizers of a rank as one: AdamW, or Muon with AdamW for what is no hidden matrix.

Megatron-Core's own do the work. The parts of a rank are
    of its chunks    data-parallel over `mesh.groups.dp`
    of shared ones   weights that every rank holds (`System.shared`): data-parallel over the world
and each of them is one optimizer, or several in a chain (Muon's matrices, AdamW's rest).
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import nn

from iomm.config import OptimizerConfig, ParallelConfig, TrainConfig
from iomm.parallel import cpu, muon
from iomm.parallel.backend_choice import INSTALL
from iomm.parallel.masters import Piece, leaves, pieces
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@final
class Optimizer:
    """Steps the weights behind `chunks` and `shared`.

    Args:
        chunks: this rank's, wrapped.
        shared: what all ranks hold, wrapped over the world; None if there is nothing.
        names: of all their weights, the same in every layout.
        settings: rates, groups, clipping.
        train: number of steps and precision.
        parallel: whether the state is sharded over the data-parallel ranks.
        mesh: where this rank stands.

    Raises:
        ValueError: an `optimizer.groups` pattern that no weight of any rank fits; a GPU without Transformer
            Engine and without apex.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        shared: DistributedDataParallel | None,
        names: Mapping[nn.Parameter, str],
        settings: OptimizerConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
    ) -> None:
        self._mesh, self._wrapped = mesh, [*chunks, *([shared] if shared else [])]
        self._sharded = parallel.distributed_optimizer
        if getattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False):
            # Megatron would take torch's AdamW, which cannot step from the state that is made ahead of the
            # first step (it has no count of steps). Without a GPU `iomm.parallel.cpu` has put ours in its
            # place.
            raise ValueError(
                "training on a GPU needs the AdamW of Transformer Engine or of NVIDIA's apex, and neither is "
                f"installed. Install the first with: {INSTALL}"
            )
        _check_groups(settings, names.values(), mesh)
        overrides = _overrides(settings, names)
        config = _config(settings, train, parallel)

        def build(models: list[Any], groups: Any) -> Any:
            # Without no_grad the distributed optimizer's shards of fp32 weights are graph nodes, and torch
            # warns at every step.
            with torch.no_grad():
                return megatron_optimizer.get_megatron_optimizer(
                    config, models, dict(overrides), pg_collection=groups, use_gloo_process_groups=False
                )

        self._tops = [build(list(chunks), mesh.groups)]
        self._tops += [build([shared], mesh.alone)] if shared else []
        self._parts = [leaf for top in self._tops for leaf in leaves(top)]
        self._of_shared = {id(leaf) for top in self._tops[1:] for leaf in leaves(top)}
        for part in self._parts:
            if not part.is_stub_optimizer:
                muon.mark_masters(part)
                part.init_state_fn(part.optimizer, part.config)  # a checkpoint may precede the first step
            # A single rank has no weights to gather.
            part._defer_param_sync = self._replicas(part) == 1
        self.pieces = self._collect(names)
        self._scheduler = _scheduler(self, settings, train)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts; the scheduler writes rates into them."""
        return [group for top in self._tops for group in top.param_groups]

    def set_lr(self, step: int) -> float:
        """The rates of this step, the first being 1; returns that of weights in no group of
        `optimizer.groups`."""
        # The schedule is a function of the step number, so it has no state of its own.
        self._scheduler.num_steps = step
        self._scheduler.step(0)
        return self._scheduler.get_lr({})

    def zero_grad(self) -> None:
        """Before a step's first backward pass."""
        for model in self._wrapped:
            model.zero_grad_buffer()
        for top in self._tops:
            top.zero_grad()

    def prepare_grads(self) -> None:
        """After the last backward pass and the sum over ranks: hand the gradients to the masters."""
        for top in self._tops:
            top.prepare_grads()

    @torch.no_grad()
    def grad_norm(self) -> float:
        """2-norm of the gradient of all weights of the model, each counted once; the same on every rank.

        Squares are summed in the gradient's own dtype within a weight, in fp64 over weights and ranks.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for part in self._parts:
            grads = part.get_grads_for_grad_norm() if self._counts(part) else []
            if grads:
                total += torch.stack(torch.ops.aten._foreach_norm.Scalar(grads)).double().square().sum()
        if self._mesh.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.sqrt().item()

    @torch.no_grad()
    def scale_grads(self, factor: float) -> None:
        """Multiply all gradients, for clipping."""
        grads = [p.grad for part in self._parts for p in part.get_parameters() if p.grad is not None]
        if grads:
            torch.ops.aten._foreach_mul_.Scalar(grads, factor)

    def step(self) -> None:
        """Change the weights, and complete them on all data-parallel ranks."""
        for top in self._tops:
            top.step_with_ready_grads()

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Complete the weights of all data-parallel ranks after each has written the pieces it steps."""
        if self._sharded:
            for model in self._wrapped:
                if model.dp_group.size() > 1:
                    model.start_param_sync(force_sync=True)

    def set_updates(self, count: int) -> None:
        """Tell AdamW, after a checkpoint was loaded, how often it has stepped: its bias correction."""
        for part in self._parts:
            if part.is_stub_optimizer or muon.is_muon(part):
                continue
            for group in part.optimizer.param_groups:
                group["step"] = count

    def _collect(self, names: Mapping[nn.Parameter, str]) -> list[Piece]:
        # By name, so that the order does not depend on how the optimizers are chained.
        found = (
            p
            for part in self._parts
            for p in pieces(part, names, 1 if self._sharded else self._replicas(part))
        )
        return sorted(found, key=lambda piece: piece.name)

    def _replicas(self, part: Any) -> int:
        return self._mesh.world_size if id(part) in self._of_shared else self._mesh.dp_size

    def _counts(self, part: Any) -> bool:
        """Whether this rank's gradients of the part belong in the sum over the world."""
        if self._sharded:
            return True
        return (self._mesh.rank if id(part) in self._of_shared else self._mesh.dp_rank) == 0


def _config(
    settings: OptimizerConfig, train: TrainConfig, parallel: ParallelConfig
) -> megatron_optimizer.OptimizerConfig:
    common: dict[str, Any] = dict(
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_norm,
        bf16=train.precision == "bf16",
        params_dtype=DTYPES[train.precision],
    )
    if settings.kind == "muon":
        common |= muon.megatron_settings(settings, train, parallel)
    else:
        common |= dict(optimizer="adam", use_distributed_optimizer=parallel.distributed_optimizer)
    return megatron_optimizer.OptimizerConfig(**common)


def _group_of(settings: OptimizerConfig, name: str) -> int | None:
    """The first group of `optimizer.groups` that a weight fits."""
    fitting = (i for i, group in enumerate(settings.groups) if fnmatchcase(name, group.match))
    return next(fitting, None)


def _check_groups(settings: OptimizerConfig, names: Iterable[str], mesh: Mesh) -> None:
    here = {_group_of(settings, name) for name in names}
    used = {index for there in mesh.gather_objects(here) for index in there} if settings.groups else set()
    for index, group in enumerate(settings.groups):
        if index not in used:
            raise ValueError(
                f'optimizer.groups: no weight is left for the pattern "{group.match}" (the first group that '
                'fits counts). Weights have names like "generator.double_blocks.0.image.qkv.weight".'
            )


def _overrides(settings: OptimizerConfig, names: Mapping[nn.Parameter, str]) -> dict[ParamKey, Any]:
    """Rates and decay of every weight, as Megatron takes them: by predicate."""
    wanted: dict[nn.Parameter, tuple[tuple[str, float], ...]] = {}
    for weight, name in names.items():
        index, override = _group_of(settings, name), {}
        group = settings.groups[index] if index is not None else None
        if group is not None and group.lr_scale != 1.0:
            override |= dict(max_lr=settings.lr * group.lr_scale, min_lr=settings.min_lr * group.lr_scale)
        decay = settings.weight_decay
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        decay = decay if weight.ndim > 1 else 0.0  # biases and other vectors have none
        if decay != settings.weight_decay:
            override |= dict(start_wd=decay, end_wd=decay)
        wanted[weight] = tuple(sorted(override.items()))

    def key(values: tuple[tuple[str, float], ...]) -> ParamKey:
        def fits(weight: nn.Parameter, _: str) -> bool:
            return wanted[weight] == values

        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=repr(values), fn=fits))

    return {key(values): dict(values) for values in sorted(set(wanted.values())) if values}


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
