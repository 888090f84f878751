"""Two ranks, data-parallel or tensor-parallel: what each holds, against the planner. Run by test_ranks.py."""

import torch
import torch.distributed as dist

from iomm.config import ParallelConfig
from iomm.encoders import Shapes
from iomm.parallel import mesh as meshes
from iomm.parallel.engine import Engine
from iomm.plan.step import stages_of
from iomm.plan.weights import conditioner_weights, generator_weights, weight_bytes
from iomm.plan.workload import varied
from iomm.system import System, plan_stages
from tests.plan.small_plans import small_work


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main(tp: int, pp: int) -> None:
    parallel = ParallelConfig(tp=tp, pp=pp)
    mesh = meshes.start(parallel)
    work = varied(small_work(parallel=parallel), train__precision="bf16", optimizer__ema_decay=0.9)
    config = work.config
    shapes = Shapes((1, work.image_tokens), 16, 64, work.patch_tokens, work.mllm.lm.width)
    system = System(config, shapes, mesh, plan_stages(config, shapes, mesh.pp_rank))
    engine = Engine(system, system.backend_config, config.optimizer, config.train, config.parallel, mesh)
    weights = dict(generator_weights(config.generator, tp, system.stages))
    if system.stages[0].first:
        weights |= conditioner_weights(config.condition, work.mllm.lm.width, config.generator.condition_width)
    expected = weight_bytes(weights, config, mesh.dp_size)
    assert len(stages_of(work)) == pp
    pieces = engine._optimizer.pieces
    state = [t for p in pieces for t in p.moments.values() if torch.is_tensor(t) and t.ndim]
    state += [p.master for p in pieces]
    assert engine.ema is not None
    held = torch.tensor([_bytes(state), _bytes(engine.ema.weights.values())], dtype=torch.float64)
    dist.all_reduce(held, group=mesh.groups.dp)  # the planner's figures are means over these ranks
    assert (held / mesh.dp_size).tolist() == [expected.optimizer, expected.ema]
    assert _bytes(system.parameters()) == expected.weights
    assert _bytes(p.main_grad for p in system.parameters() if p.requires_grad) == expected.gradients
    meshes.stop()


if __name__ == "__main__":
    import sys

    main(*(int(argument) for argument in sys.argv[1:]))
