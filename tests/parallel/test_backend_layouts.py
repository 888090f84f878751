"""What Megatron is told about a layout; several ranks are in tests/model/test_sequence_parallel.py."""

import pytest
import torch
from torch import nn

from iomm.config import ParallelConfig
from iomm.parallel import backend
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import Mesh


def _config(mesh: Mesh, parallel: ParallelConfig):
    return transformer_config(8, 2, torch.float32, mesh, parallel)


def test_interleaved_stages_send_singly_and_plain_ones_in_batches(mesh: Mesh) -> None:
    # Batched sends between two interleaved stages give wrong gradients without an error.
    plain = _config(mesh, ParallelConfig(pp=2))
    assert (plain.batch_p2p_comm, plain.overlap_p2p_comm) == (True, False)
    assert plain.virtual_pipeline_model_parallel_size is None
    interleaved = _config(mesh, ParallelConfig(pp=2, virtual_stages=3))
    assert (interleaved.batch_p2p_comm, interleaved.overlap_p2p_comm) == (False, True)
    assert interleaved.virtual_pipeline_model_parallel_size == 3
    assert plain.variable_seq_lengths and interleaved.variable_seq_lengths
    assert plain.pipeline_model_parallel_size == interleaved.pipeline_model_parallel_size == 2


@pytest.mark.parametrize(("mode", "granularity"), [("none", None), ("selective",) * 2, ("full",) * 2])
def test_recomputation_is_told_in_megatrons_word(mesh: Mesh, mode: str, granularity: str | None) -> None:
    parallel = ParallelConfig(recompute=mode)  # type: ignore[arg-type]
    assert _config(mesh, parallel).recompute_granularity == granularity


def test_selective_recomputation_is_refused_where_the_products_are_not_torchs(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "choose_backend", lambda *_: "te")
    with pytest.raises(ValueError, match="recompute = selective.*Set parallel.recompute=full or none"):
        _config(mesh, ParallelConfig(recompute="selective"))


def test_a_sequence_that_is_not_split_passes_scatter_and_gather_and_no_gradient_is_partial(
    mesh: Mesh,
) -> None:
    layers = Layers(_config(mesh, ParallelConfig()), mesh)
    assert (layers.sequence_ranks, layers.sequence_rank) == (1, 0)
    x_LBC = torch.randn(4, 2, 8)
    assert layers.scatter(x_LBC) is x_LBC and layers.gather(x_LBC) is x_LBC
    made = nn.ModuleList([layers.column(8, 8), layers.replicated(8, 8), layers.head_norm(4)])
    layers.mark_partial_gradients(made)
    assert [getattr(weight, "sequence_parallel", None) for weight in made.parameters()] == [False] * 5
