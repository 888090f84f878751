"""Which part of each weight a rank holds, in the terms of Megatron's sharded checkpoints.

A weight says so itself (`tensor_model_parallel`, `partition_dim`, set by the layers of `backend`), so any
`nn.Module` can be described, whatever its containers are.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from iomm.parallel import cpu
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.utils import (  # noqa: E402
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then persistent buffers, by name: what a checkpoint of the module holds."""
    parameters = dict(module.named_parameters())
    names = module.state_dict().keys()
    return parameters | {name: b for name, b in module.named_buffers() if name in names}


def sharded(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], prefix: str, mesh: Mesh
) -> dict[str, ShardedTensor]:
    """Describe `tensors` for a sharded checkpoint; each is laid out as the weight of the same name in `like`.

    Returns:
        By name; the key inside the checkpoint is `prefix` + name.
    """
    groups = {"tp_group": mesh.groups.tp, "dp_cp_group": mesh.groups.dp_cp}
    out = {}
    for name, tensor in tensors.items():
        weight = like[name]
        if getattr(weight, "tensor_model_parallel", False):
            axis = weight.partition_dim  # type: ignore[attr-defined]
            out[name] = make_tp_sharded_tensor_for_checkpoint(tensor, prefix + name, axis, **groups)
        else:
            # One that all ranks share has a copy on every pipeline stage too.
            stage = mesh.pp_rank if getattr(weight, "shared_by_all", False) else 0
            replica = (stage, mesh.tp_rank, mesh.dp_rank)
            out[name] = make_sharded_tensor_for_checkpoint(
                tensor, prefix + name, replica_id=replica, **groups
            )
    return out
