"""The planner's weights are those of real modules, by name and shape, in every layout."""

import pytest
import torch

from iomm.config import ParallelConfig
from iomm.encoders import Shapes
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh
from iomm.plan.shapes import FLUX_VAE, INTERNVL3_2B
from iomm.plan.step import stages_of
from iomm.plan.weights import (
    codec_weights,
    conditioner_weights,
    generator_weights,
    is_hidden_matrix,
    weight_bytes,
)
from iomm.plan.workload import Workload, varied
from iomm.system import System, plan_stages
from tests.plan.encoders import codec_of, text_config, vision_config
from tests.plan.pretended import mesh_of
from tests.plan.small_plans import FLUX, Z_IMAGE, small_work

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tp=2),
    ParallelConfig(tp=2, sequence_parallel=True),
    ParallelConfig(tp=4, sequence_parallel=True),
    ParallelConfig(pp=2),
    ParallelConfig(pp=2, virtual_stages=2),
    ParallelConfig(tp=2, pp=2),
    ParallelConfig(tp=2, pp=2, encoders="shared"),
]


def shapes_of(work: Workload) -> Shapes:
    grid, channels = (1, work.image_tokens), work.config.generator.token_channels
    return Shapes(grid, 16, channels, work.patch_tokens, work.mllm.lm.width)


def planned(work: Workload, stage: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    """What the planner says a rank of that stage holds: name -> (shape, trained)."""
    config, chunks = work.config, stages_of(work)[stage]
    found = dict(generator_weights(config.generator, config.parallel.tp, chunks))
    shared = config.parallel.encoders == "shared" and config.parallel.tp * config.parallel.pp > 1
    if shared or any(chunk.first for chunk in chunks):
        width = config.generator.condition_width
        found |= conditioner_weights(config.condition, work.mllm.lm.width, width)
    return {name: (weight.shape, weight.trained) for name, weight in found.items()}


@pytest.mark.parametrize("generator", [FLUX, Z_IMAGE], ids=["flux", "z_image"])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_every_rank_holds_the_weights_the_planner_names(generator, parallel):
    work = small_work(generator, parallel)
    for stage, chunks in enumerate(stages_of(work)):
        with torch.device("meta"):
            system = System(work.config, shapes_of(work), mesh_of(parallel, stage), chunks)
        real = {name: (tuple(p.shape), p.requires_grad) for name, p in system.named_parameters()}
        assert real == planned(work, stage)


def test_double_blocks_at_the_end_keep_an_unread_half_frozen():
    work = varied(small_work(), generator__single_blocks=0)
    weights = generator_weights(work.config.generator, 1, stages_of(work)[0])
    frozen = {name for name, weight in weights.items() if not weight.trained}
    assert frozen and all(name.startswith("generator.double_blocks.2.condition.") for name in frozen)


@pytest.mark.parametrize("parallel", [ParallelConfig(pp=2), ParallelConfig(pp=4), LAYOUTS[5]], ids=str)
def test_stages_are_dealt_as_a_run_deals_them(parallel):
    work = varied(small_work(parallel=parallel), parallel__encoders="shared")
    dealt = [plan_stages(work.config, shapes_of(work), rank) for rank in range(parallel.pp)]
    assert stages_of(work) == dealt


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bytes_equal_what_the_engine_holds(precision, kind, mesh: Mesh):
    sharded = precision == "bf16" or kind == "adamw"
    work = varied(
        small_work(),
        train__precision=precision,
        optimizer__kind=kind,
        optimizer__ema_decay=0.9,
        parallel__distributed_optimizer=sharded,
    )
    config = work.config
    system = System(config, shapes_of(work), mesh)
    engine = Engine(system, system.backend_config, config.optimizer, config.train, config.parallel, mesh)
    weights = generator_weights(config.generator, 1, stages_of(work)[0])
    weights = weights | conditioner_weights(
        config.condition, work.mllm.lm.width, config.generator.condition_width
    )
    expected = weight_bytes(weights, config, 1)
    assert _bytes(system.parameters()) == expected.weights
    pieces = engine._optimizer.pieces
    moments = [t for p in pieces for t in p.moments.values() if torch.is_tensor(t) and t.ndim]
    masters = [p.master for p in pieces if p.master.dtype != p.weight.dtype]
    assert _bytes(moments) + _bytes(masters) == expected.optimizer
    assert engine.ema is not None and _bytes(engine.ema.weights.values()) == expected.ema
    gradients = [p.main_grad for p in system.parameters() if p.requires_grad]
    assert _bytes(gradients) == expected.gradients


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_muon_takes_hidden_matrices_and_leaves_the_ends_to_adamw():
    weights = generator_weights(FLUX, 1, stages_of(small_work())[0])
    hidden = {name for name, weight in weights.items() if is_hidden_matrix(name, weight)}
    assert "generator.double_blocks.0.image.qkv.weight" in hidden
    assert not any("modulation" in name or "image_in" in name or name.endswith("bias") for name in hidden)


def test_published_encoders_have_as_many_weights_as_their_classes():
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    lm, vit = INTERNVL3_2B.lm, INTERNVL3_2B.vit
    config = InternVLConfig(
        text_config=text_config(lm), vision_config=vision_config(vit), tie_word_embeddings=lm.tied
    )
    with torch.device("meta"):
        mllm, vae = InternVLForConditionalGeneration(config), codec_of(FLUX_VAE)
    assert sum(p.numel() for p in vae.parameters()) == codec_weights(FLUX_VAE)
    assert sum(p.numel() for p in mllm.parameters()) == INTERNVL3_2B.weights
