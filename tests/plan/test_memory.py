"""Saved activations against what autograd saves of real blocks, and the rest of a rank's memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from iomm.config import GeneratorConfig, ParallelConfig
from iomm.model.blocks_flux import DoubleBlock, SingleBlock
from iomm.model.blocks_z_image import Block, mlp_width
from iomm.model.padding import padded
from iomm.model.recompute import KEPT_OPERATORS
from iomm.model.rope import Rope, rope
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import Mesh
from iomm.plan import memory
from iomm.plan.memory import Saved, in_flight, rank_memory
from iomm.plan.shapes import LmShape
from iomm.plan.step import stages_of
from iomm.plan.workload import varied
from tests.plan import small_plans
from tests.plan.encoders import lm_of
from tests.plan.small_plans import small_work

IMAGE, CONDITION, SAMPLES, WIDTH = 96, 32, 2, 256
FLUX = GeneratorConfig(
    hidden_size=WIDTH, heads=4, double_blocks=1, single_blocks=1, rope_axes=(16, 24, 24), condition_width=8
)
Z_IMAGE = GeneratorConfig(
    family="z_image",
    hidden_size=WIDTH,
    heads=4,
    double_blocks=0,
    single_blocks=1,
    rope_axes=(16, 24, 24),
    condition_width=8,
)
PASS = (IMAGE + CONDITION) * SAMPLES * WIDTH * 2  # bytes


def saved_bytes(block: nn.Module, *inputs: Tensor | Rope | None, least: int) -> int:
    """Bytes of the storages that a forward pass saves, without weights and without those below `least`."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() >= least:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(*inputs)
    assert out is not None
    return sum(found.values())


def layers_of(config: GeneratorConfig, mesh: Mesh) -> tuple[Layers, Rope]:
    made = transformer_config(config.hidden_size, config.heads, torch.bfloat16, mesh, ParallelConfig())
    positions = torch.zeros(IMAGE + CONDITION, 3, dtype=torch.long)
    return Layers(made, mesh), rope(positions, config.rope_axes, config.rope_theta, torch.bfloat16)


def rows(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *(shape or (SAMPLES, WIDTH)), dtype=torch.bfloat16).requires_grad_()


def passes(saved: Saved) -> float:
    return saved.whole + saved.split


def test_a_double_block_saves_what_the_formula_says(mesh: Mesh):
    layers, rope_ = layers_of(FLUX, mesh)
    inputs = rows(CONDITION), rows(IMAGE), rows(SAMPLES, WIDTH), rope_, None
    # Left out: statistics, modulation vectors and the rotations, which all blocks share.
    real = saved_bytes(DoubleBlock(layers, FLUX, last=False), *inputs, least=PASS // 5)
    formula = memory.double_block(4, fused=True, head_norm_in_fp32=True)
    assert real == PASS * passes(formula)


def test_a_single_block_saves_what_the_formula_says(mesh: Mesh):
    layers, rope_ = layers_of(FLUX, mesh)
    inputs = rows(IMAGE + CONDITION), rows(SAMPLES, WIDTH), rope_, None
    real = saved_bytes(SingleBlock(layers, FLUX), *inputs, least=PASS // 5)
    assert real == PASS * passes(memory.single_block(4, fused=True, head_norm_in_fp32=True))


@pytest.mark.parametrize("modulated", [True, False])
def test_a_z_image_block_saves_what_the_formula_says(modulated, mesh: Mesh):
    layers, rope_ = layers_of(Z_IMAGE, mesh)
    inputs = rows(IMAGE + CONDITION), rows(SAMPLES, WIDTH), rope_, None
    real = saved_bytes(Block(layers, Z_IMAGE, modulated=modulated), *inputs, least=PASS // 5)
    share = mlp_width(WIDTH) / WIDTH
    formula = memory.z_image_block(share, modulated=modulated, norms_in_fp32=True)
    assert real == pytest.approx(PASS * passes(formula), rel=1e-12)


def test_a_layer_of_the_lms_query_rows_saves_what_the_formula_says():
    p, q = 64, 128
    one, two = (_saved_by_query_rows(layers, p, q) for layers in (1, 2))
    shape = _lm_shape(1)
    formula = q * (3 * shape.mlp / shape.width + 6) + 3 * shape.kv_width / shape.width * (p + q)
    assert two - one == pytest.approx(formula, rel=0.02)


def _lm_shape(layers: int) -> LmShape:
    return LmShape(width=256, layers=layers, heads=2, kv_heads=1, mlp=1024, vocabulary=10, tied=True)


def _saved_by_query_rows(layers: int, p: int, q: int) -> float:
    """Rows of the LM's width that a pass of q rows against a prefix of p saves."""
    from transformers import DynamicCache

    shape = _lm_shape(layers)
    lm = lm_of(shape).to(torch.bfloat16)
    cache = DynamicCache(config=lm.config)
    with torch.no_grad():
        prefix = torch.randn(SAMPLES, p, shape.width, dtype=torch.bfloat16)
        lm(inputs_embeds=prefix, past_key_values=cache, use_cache=True)

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = lm

        def forward(self, x: Tensor) -> Tensor:
            attend = torch.ones(SAMPLES, p + q, dtype=torch.long)
            return self.lm(
                inputs_embeds=x, attention_mask=attend, past_key_values=cache, use_cache=True
            ).last_hidden_state

    queries = torch.randn(SAMPLES, q, shape.width, dtype=torch.bfloat16).requires_grad_()
    return saved_bytes(Rows(), queries, least=0) / (SAMPLES * shape.width * 2)


class Kept(TorchDispatchMode):
    """Bytes of the results that selective recomputation keeps."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator in KEPT_OPERATORS:
            result = out[0] if isinstance(out, tuple) else out
            size = result.numel() * result.element_size()
            self.bytes += size if size >= self.least else 0  # modulation has a row a sample
        return out


@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_selective_recomputation_keeps_products_and_attention(family, mesh: Mesh):
    config = FLUX if family == "flux" else Z_IMAGE
    layers, rope_ = layers_of(config, mesh)
    s = rows(IMAGE + CONDITION)
    if family == "flux":
        block, inputs = DoubleBlock(layers, config, last=False), (s[:CONDITION], s[CONDITION:])
        inputs = (*inputs, rows(SAMPLES, WIDTH), rope_, None)
    else:
        block, inputs = Block(layers, config, modulated=True), (s, rows(SAMPLES, WIDTH), rope_, None)
    with Kept(PASS // 5) as kept:
        block(*inputs)
    formula = memory._selective(config)
    assert kept.bytes == pytest.approx(PASS * (formula.whole - 1 + formula.split), rel=1e-12)  # and the input


def test_recomputation_keeps_less():
    kept = {}
    for recompute in ("none", "selective", "full"):
        work = varied(small_work(), parallel__recompute=recompute)
        kept[recompute] = sum(memory.block_activations(work, 4))
    assert kept["full"] < kept["selective"] < kept["none"]


def test_tensor_parallel_ranks_keep_less_and_least_with_sequence_parallelism():
    layouts = ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True)
    alone, split, spread = (sum(memory.block_activations(small_work(parallel=p), 4)) for p in layouts)
    assert spread == pytest.approx(alone / 2)
    assert spread < split < alone


@pytest.mark.parametrize(
    ("pp", "virtual", "stage", "micro_batches", "held"),
    [
        (1, 1, 0, 8, 1),
        (4, 1, 0, 8, 4),
        (4, 1, 3, 8, 1),
        (4, 1, 0, 2, 2),
        (2, 2, 0, 8, 2.5),
        (2, 2, 1, 8, 1.5),
    ],
)
def test_micro_batches_in_flight(pp, virtual, stage, micro_batches, held):
    assert in_flight(ParallelConfig(pp=pp, virtual_stages=virtual), stage, micro_batches) == held


def test_the_peak_is_the_sum_of_the_items():
    work = small_work()
    made = rank_memory(work, 0, stages_of(work)[0], 1, 4)
    assert made.peak == sum(vars(made).values()) and min(vars(made).values()) >= 0


def test_only_the_first_stage_holds_encoders_unless_they_are_shared():
    work = small_work(parallel=ParallelConfig(pp=2))
    last = stages_of(work)[1]
    assert rank_memory(work, 1, last, 1, 4).encoders == 0
    shared = varied(work, parallel__encoders="shared")
    assert rank_memory(shared, 1, last, 1, 4).encoders > 0


def test_the_distributed_optimizer_spreads_state_and_average_over_the_replicas():
    work = small_work()
    whole = varied(work, parallel__distributed_optimizer=False)
    chunks = stages_of(work)[0]
    one, eight = rank_memory(whole, 0, chunks, 8, 1), rank_memory(work, 0, chunks, 8, 1)
    assert eight.optimizer == pytest.approx(one.optimizer / 8) and eight.ema == pytest.approx(one.ema / 8)
    assert eight.weights == one.weights and eight.gradients == one.gradients


def test_z_images_refiners_are_the_first_stages():
    work = small_work(small_plans.Z_IMAGE, ParallelConfig(pp=2))
    (first, *_), (last, *_) = stages_of(work)
    bare = small_work(replace(small_plans.Z_IMAGE, refiner_blocks=0), ParallelConfig(pp=2))
    size, width = 4, small_plans.Z_IMAGE.hidden_size
    of_blocks = sum(memory.block_activations(work, size)[i] for i in first.blocks)
    rows = padded(64) + padded(math.ceil(work.condition_tokens(size)))
    least = passes(memory.z_image_block(mlp_width(width) / width, modulated=False))
    most = passes(memory.z_image_block(mlp_width(width) / width, modulated=True))
    refiners = rank_memory(work, 0, (first,), 1, 1).activations - of_blocks
    unit = size * width * work.element_bytes * rows
    assert unit * least < refiners < unit * most
    assert rank_memory(work, 1, (last,), 1, 1).activations == sum(
        memory.block_activations(bare, size)[i] for i in last.blocks
    )


def test_the_autoencoders_workspace_goes_with_the_cache():
    work = small_work()
    assert memory.encoder_workspace(work, 4) == 3 * 4 * 32 * 32 * 8 * 4
    assert memory.encoder_workspace(replace(work, cached=frozenset({"vae"})), 4) == 0
