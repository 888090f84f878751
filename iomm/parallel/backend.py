"""The layers a model is built from, whoever's they are: `local` is Megatron-Core's, on any device, in fp32,
bf16 or fp64; `te` is Transformer Engine's, on a GPU (not yet run on one). Names and shapes of the weights are
the same, so either loads the other's checkpoint.

    column: y_out/tp = x_in W[out/tp, in]^T + b[out/tp]             every rank holds a slice of the output
        channels
    row:    y_out    = sum over ranks of x_in/tp W[out, in/tp]^T + b   every rank holds a slice of the input
        channels

A block is column -> (attention over its own heads | activation) -> row: two all-reduces a block, one in each
direction. With sequence parallelism a rank holds 1/tp of the sequence outside of this pair: a column gathers
it, a row reduces and scatters it (arXiv 2205.05198 section 4.2.2), and what is computed outside, on a part of
the tokens, gives a part of its weights' gradient (`mark_partial_gradients`).

Weights come uninitialised: the model initialises them by name, so that the layout has no influence on them.
"""

import importlib
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iomm.config import ParallelConfig
from iomm.parallel import cpu
from iomm.parallel.backend_choice import choose_backend, fuses_gradients
from iomm.parallel.local import Column, HeadNorm, Replicated, Row
from iomm.parallel.mesh import Mesh
from iomm_kernels import csrc

cpu.prepare()  # before the first import of Megatron: its base classes are bound at import time

from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

if TYPE_CHECKING:
    from iomm.parallel import te


def transformer_config(
    hidden_size: int,
    heads: int,
    dtype: torch.dtype,
    mesh: Mesh,
    parallel: ParallelConfig,
) -> TransformerConfig:
    """Megatron's settings for a model of this width; `dtype` is that of the parameters and of the
    computation.

    Raises:
        ValueError: the backend is missing or cannot recompute selectively, or the heads do not divide over
            the tensor-parallel ranks.
    """
    backend = choose_backend(parallel, dtype)
    if backend != "local" and parallel.recompute == "selective":
        raise ValueError(
            "parallel.recompute = selective keeps the results of torch's matrix products, and Transformer "
            "Engine's are none of them. Set parallel.recompute=full or none, or parallel.backend=local."
        )
    if heads % mesh.tp_size:
        raise ValueError(
            f"generator.heads {heads} is not divisible by parallel.tp {mesh.tp_size}: a rank holds "
            "whole heads. Lower parallel.tp or change the heads."
        )
    interleaved = parallel.virtual_stages > 1
    return TransformerConfig(
        # Read by Megatron's own transformer blocks only, of which there are none.
        num_layers=parallel.pp * parallel.virtual_stages,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        tensor_model_parallel_size=mesh.tp_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if interleaved else None,
        # Stages tell each other the shape ahead of every tensor: micro-batches, and training and evaluation,
        # may differ in their numbers of samples and condition tokens.
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall",  # there are no experts; the default refuses varying lengths
        # Interleaved with two stages, batched sends between the same two ranks pair up wrongly (silently);
        # 1F1B knows no other.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        microbatch_group_size_per_vp_stage=parallel.pp,
        deallocate_pipeline_outputs=parallel.pp > 1,
        **_recompute(parallel.recompute),
        perform_initialization=False,
        use_cpu_initialization=True,  # parameters appear on torch's default device, which may be "meta"
        transformer_impl="local" if backend == "local" else "transformer_engine",
        gradient_accumulation_fusion=fuses_gradients(backend),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        cuda_graph_modules=[],  # the default warns about its own deprecation
    )


def _recompute(mode: str) -> dict[str, Any]:
    """In Megatron's words; `iomm.model.recompute` reads the granularity."""
    if mode == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    # None of Megatron's own modules: what is selected is said in `iomm.model.recompute`.
    return dict(recompute_granularity=None if mode == "none" else mode, recompute_modules=[])


def kernel_provider(kernels: str, device: torch.device, dtype: torch.dtype) -> str:
    """`Config.kernels` as the operators take it: with csrc, those without a compiled form are PyTorch's.

    Raises:
        ValueError: csrc was asked for where it cannot serve.
    """
    if kernels != "csrc":
        return kernels
    problem = csrc.load_problem("cpu") if device.type == "cpu" else "serves a CPU only"
    if dtype == torch.float64:
        problem = "computes in fp32, and train.precision is fp64"
    if problem is not None:
        raise ValueError(
            f"kernels = csrc was asked for on {device.type}, but it {problem}. Set kernels=auto, or eager."
        )
    return "auto"  # on a CPU: csrc where it has the operator, else eager; which is logged


@final
class Layers:
    """Makes the layers of one model. All of them are uninitialised and take `config.params_dtype`.

    `kernels` is the provider of the operators between them (`iomm_kernels.launch`).
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh, kernels: str = "auto") -> None:
        self.config = config
        self.mesh = mesh
        self.kernels = kernels
        # Imported where it is used only: without a GPU the import fails.
        self._te: Any = (
            None if config.transformer_impl == "local" else importlib.import_module("iomm.parallel.te")
        )

    def column(self, in_size: int, out_size: int, *, bias: bool = True) -> "Column | te.Linear":
        """Linear of which a rank computes out_size/tp output channels.

        Raises:
            ValueError: `out_size` does not divide over the tensor-parallel ranks.
        """
        self._check_divides("output", out_size)
        if self._te is not None:
            return self._te.Linear(in_size, out_size, **self._te_common(bias), split="column")
        return Column(in_size, out_size, **self._common(bias), gather_output=False)

    def row(self, in_size: int, out_size: int, *, bias: bool = True) -> "Row | te.Linear":
        """Linear of which a rank holds in_size/tp input channels; the results are summed over the ranks.

        Raises:
            ValueError: `in_size` does not divide over the tensor-parallel ranks.
        """
        self._check_divides("input", in_size)
        if self._te is not None:
            return self._te.Linear(in_size, out_size, **self._te_common(bias), split="row")
        return Row(in_size, out_size, **self._common(bias), input_is_parallel=True)

    def replicated(self, in_size: int, out_size: int, *, bias: bool = True) -> "Replicated | te.Linear":
        """Linear that every tensor-parallel rank computes in full, on the same input.

        Its gradients are right if its output is used by all ranks alike, e.g. added to a row's output or fed
        to a column: a column sums its input's gradient over the ranks. With sequence parallelism the input is
        the rank's own tokens (see `mark_partial_gradients`).
        """
        if self._te is not None:
            return self._te.Linear(in_size, out_size, **self._te_common(bias), split=None)
        return Replicated(in_size, out_size, bias=bias, config=self.config, mesh=self.mesh)

    def attention(self, heads: int, head_size: int) -> "te.Attention | None":
        """The backend's own attention over a rank's part of `heads`, in which every query attends to every
        key; None: torch's.

        With keys that are not attended to, torch's serves all backends: Transformer Engine's fast kernels
        know masks by length only, and ours have gaps in the middle of a sequence.
        """
        return None if self._te is None else self._te.Attention(self.heads_per_rank(heads), head_size)

    def head_norm(self, head_size: int) -> HeadNorm:
        """The weight of an RMSNorm over one head's channels, for queries and keys."""
        return HeadNorm(head_size, config=self.config, mesh=self.mesh)

    def checkpoint(self, block: nn.Module, *args: Any) -> Any:
        """`block(*args)`, computed again in the backward pass from its arguments, which alone are kept.

        There is no dropout, so no generator state is kept either.
        """
        if self._te is not None:
            return self._te.checkpoint(block, *args)
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)

    @property
    def sequence_ranks(self) -> int:
        """Over how many ranks a sequence is split."""
        return self.mesh.tp_size if self.config.sequence_parallel else 1

    @property
    def sequence_rank(self) -> int:
        """Which slice of a sequence is this rank's."""
        return self.mesh.tp_rank if self.config.sequence_parallel else 0

    def scatter(self, x_LBC: Tensor) -> Tensor:
        """This rank's slice (L / sequence_ranks, B, C) of a sequence that all ranks have; its gradient is
        gathered, and so the same on all of them."""
        if self.sequence_ranks == 1:
            return x_LBC
        return scatter_to_sequence_parallel_region(x_LBC, group=self.mesh.groups.tp)

    def gather(self, x_LBC: Tensor) -> Tensor:
        """The whole sequence from the ranks' slices, for a computation that all ranks do alike: each keeps
        its slice of the gradient."""
        if self.sequence_ranks == 1:
            return x_LBC
        return gather_from_sequence_parallel_region(
            x_LBC, tensor_parallel_output_grad=False, group=self.mesh.groups.tp
        )

    def mark_partial_gradients(self, module: nn.Module) -> None:
        """Tell Megatron which gradients of `module` to sum over the tensor-parallel ranks after the backward
        pass (`finalize_model_grads`).

        With sequence parallelism these are all that are not split: a rank applies them to its tokens (norms,
        modulation, embeddings, rows' biases), or to its heads (query and key norms).
        """
        for weight in module.parameters():
            split = getattr(weight, "tensor_model_parallel", False)
            weight.sequence_parallel = self.sequence_ranks > 1 and not split  # type: ignore[attr-defined]

    def heads_per_rank(self, heads: int) -> int:
        """How many of `heads` attention heads a rank holds.

        Raises:
            ValueError: they do not divide.
        """
        self._check_divides("head", heads)
        return heads // self.mesh.tp_size

    def _check_divides(self, what: str, size: int) -> None:
        if size % self.mesh.tp_size:
            raise ValueError(
                f"{what} count {size} of a tensor-parallel layer is not divisible by "
                f"parallel.tp {self.mesh.tp_size}. Lower parallel.tp or change the width."
            )

    def _common(self, bias: bool) -> dict[str, Any]:
        return dict(
            config=self.config,
            init_method=nn.Identity(),  # never called: perform_initialization is False
            bias=bias,
            skip_bias_add=False,
            tp_group=self.mesh.groups.tp,
        )

    def _te_common(self, bias: bool) -> dict[str, Any]:
        return dict(bias=bias, config=self.config, mesh=self.mesh)
