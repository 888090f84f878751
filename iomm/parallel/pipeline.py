"""The order in which chunks of the model work on micro-batches: Megatron's schedules, seen from one rank.

    pp = 1                       forward, backward, next micro-batch
    pp > 1, one chunk a rank     1F1B: one forward, one backward once the pipeline is full
    pp > 1, more chunks a rank   interleaved 1F1B: chunk v of rank p is number v * pp + p of the model

Between chunks travels one tensor (S, B, H) of `config.pipeline_dtype`; its shape travels ahead of it, so
micro-batches may differ in length.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor, nn

from iomm.parallel import cpu
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.utils import get_attr_wrapped_model  # noqa: E402

# forward(chunk, carried, micro_batch): `carried` is what the chunk before returned, None on the first chunk.
# Returns (carried, {}), on the last chunk (scalar loss, scalars for the log; the same names every time).
Forward = Callable[[Any, Tensor | None, Any], tuple[Tensor, dict[str, Tensor]]]


@final
class Stage(MegatronModule):
    """What Megatron's schedules expect of a model, around one chunk."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False  # asked for when gradients are finalised over stages

    def __init__(self, config: TransformerConfig, chunk: nn.Module, index: int, mesh: Mesh) -> None:
        super().__init__(config)
        self.module = chunk
        self.vp_stage = index if mesh.virtual_stages > 1 else None
        self.pre_process = mesh.is_first_stage and index == 0
        self.post_process = mesh.is_last_stage and index == mesh.virtual_stages - 1
        self.carried: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """What the chunk before has sent; called by the schedule."""
        self.carried = tensors[0]

    def take_carried(self) -> Tensor | None:
        """That tensor, once."""
        carried, self.carried = self.carried, None
        return carried


@final
class Pipeline:
    """Runs the chunks of this rank, in step with the other stages.

    Args:
        chunks: this rank's, as many as the mesh has virtual stages.
        config: what the layers were made with; its hooks are set here and by the engine.
        mesh: where this rank stands.
        wrap: what is put around each `Stage` (Megatron's DistributedDataParallel), given it and its index.

    Raises:
        ValueError: another number of chunks than `parallel.virtual_stages`.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        config: TransformerConfig,
        mesh: Mesh,
        wrap: Callable[[Stage, int], nn.Module] = lambda stage, _: stage,
    ) -> None:
        if len(chunks) != mesh.virtual_stages:
            raise ValueError(
                f"this rank has {len(chunks)} chunks, parallel.virtual_stages is {mesh.virtual_stages}: a "
                "pipeline rank holds one chunk a virtual stage. Make them equal."
            )
        self.config, self.mesh = config, mesh
        self.models: list[Any] = [
            wrap(Stage(config, chunk, index, mesh), index) for index, chunk in enumerate(chunks)
        ]
        self._schedule = get_forward_backward_func(
            pp_size=mesh.pp_size, vp_size=mesh.virtual_stages if mesh.virtual_stages > 1 else None
        )
        self._groups: dict[str, Any] = {"pg_collection": mesh.groups}
        if mesh.pp_size > 1:
            self._groups["p2p_communicator"] = P2PCommunicator(mesh.groups.pp, config)

    def run(self, forward: Forward, micro_batches: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch, then `config.finalize_model_grads_func`. The gradient is
        that of the mean loss.

        Returns:
            on the last stage the scalars of each micro-batch ("loss" and the others); elsewhere nothing.

        Raises:
            ValueError: no micro-batch, or a number of them that the interleaved schedule cannot take.
        """
        self._check_count(len(micro_batches))

        def forward_step(batches: Any, model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
            stage: Any = get_attr_wrapped_model(model, "take_carried", return_model_obj=True)
            out, metrics = forward(stage.module, stage.take_carried(), next(batches))
            if not stage.post_process:
                # Once sent, its memory is given back, which that of a view cannot be.
                return (out if out._base is None else out.clone()), None
            logged = {name: value.detach().clone() for name, value in {"loss": out, **metrics}.items()}
            # The schedule divides the loss by the number of micro-batches in place: give it a copy.
            return out.clone(), lambda scaled: (scaled, logged)

        interleaved = self.mesh.virtual_stages > 1
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.models] if interleaved else iter(micro_batches),
            model=self.models if interleaved else self.models[0],
            num_microbatches=len(micro_batches),
            seq_length=1,  # of pipeline buffers with fixed shapes, which are not used
            micro_batch_size=1,
            **self._groups,
        )

    def _check_count(self, count: int) -> None:
        mesh = self.mesh
        if count == 0:
            raise ValueError(
                "a step needs at least one micro-batch. Raise train.global_batch_images, or use fewer "
                "data-parallel ranks."
            )
        if mesh.virtual_stages > 1 and count % mesh.pp_size:
            raise ValueError(
                f"{count} micro-batches a step are not a multiple of parallel.pp {mesh.pp_size}, which the "
                "interleaved schedule (parallel.virtual_stages > 1) needs. Change train.micro_batch_images "
                f"or train.global_batch_images so that each rank gets a multiple of {mesh.pp_size}, or set "
                "parallel.virtual_stages=1."
            )
