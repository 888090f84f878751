"""What one training step needs on this rank: from sample indices to micro-batches, and the forward pass of a
pipeline chunk.

The frozen encoders run before the pipeline starts, where `parallel.encoders` puts them:

    first_stage   the ranks of the first stage encode every micro-batch; adapter and MLLM run in its first
                  chunk
    shared        micro-batch m is encoded by rank m mod M of the M ranks of the model-parallel group, which
                  also runs adapter and MLLM on it; its condition tokens travel to the first stage, and their
                  gradient back to the rank that made them

Latents go to all ranks of the group: the first stage makes x_t of them, the last one the loss. B samples of a
micro-batch, L latent tokens of C numbers, T condition tokens of E channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iomm.data.loader import Batch
from iomm.encoders import Encoders
from iomm.parallel.engine import DTYPES
from iomm.parallel.mesh import Mesh
from iomm.system import Chunked, MicroBatch, System, micro_batch


@dataclass(frozen=True)
class Dealt:
    """One step's micro-batches before encoding: everybody's sample indices and image sizes, and the samples
    of those that this rank encodes, by number."""

    indices: Sequence[Sequence[int]]
    sizes_px: Sequence[tuple[int, int]]  # (height, width)
    batches: Mapping[int, Batch]


@final
class StepInputs:
    """Encodes micro-batches and routes them to where they are needed.

    Args:
        system: this rank's part.
        encoders: the frozen encoders, on ranks that have them.
        mesh: where this rank stands.
    """

    def __init__(self, system: System, encoders: Encoders | None, mesh: Mesh) -> None:
        self.system, self.encoders, self.mesh = system, encoders, mesh
        self._dtype = DTYPES[system.config.train.precision]

    def owner(self, number: int) -> int:
        """Rank within the model-parallel group that encodes this micro-batch (with `first_stage`: one of
        several that do)."""
        return number % self.mesh.mp_size if self.system.shares_encoders else 0

    def encodes(self, number: int) -> bool:
        """Whether this rank encodes micro-batch `number` of a step."""
        if self.system.shares_encoders:
            return self.owner(number) == self.mesh.mp_rank
        return self.mesh.is_first_stage

    def encode(self, dealt: Dealt) -> list[MicroBatch]:
        """This rank's micro-batches of one step; all ranks of the model-parallel group call.

        Raises:
            ValueError: a caption that is too long or empty; the message names the sample.
        """
        made: dict[int, MicroBatch] = {}
        for number, batch in dealt.batches.items():
            assert self.encoders is not None
            made[number] = micro_batch(self.system, self.encoders, self.encoders.encode(batch))
        if self.mesh.mp_size == 1:
            return [made[number] for number in range(len(dealt.indices))]
        deals = zip(dealt.indices, dealt.sizes_px, strict=True)
        items = [made.get(number) or self._blank(*deal) for number, deal in enumerate(deals)]
        self._route_attend(items, made)
        for item in items:
            item.latent_BLC = item.latent_BLC.contiguous()
        self._broadcast([item.latent_BLC for item in items])
        return items

    def forward(
        self, chunk: nn.Module, carried_SBD: Tensor | None, item: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One chunk for one micro-batch: what the next chunk needs, or the mean velocity loss."""
        assert isinstance(chunk, Chunked)
        mllm = self.encoders.mllm if self.encoders is not None else None
        out = self.system.advance(chunk.chunk, carried_SBD, item, mllm)
        return (out.mean() if chunk.chunk.last else out), {}

    def conditions(self, items: Sequence[MicroBatch]) -> Callable[[], None]:
        """With shared encoders, before the pipeline: compute this rank's conditions and hand all of them to
        the first stage.

        Returns:
            what has to run after the pipeline's backward pass: the gradients go back to the conditions'
            makers, which run theirs.
        """
        if not self.system.shares_encoders:
            return lambda: None
        assert self.encoders is not None
        own = {}
        for number, item in enumerate(items):
            if self.encodes(number):
                assert item.prefix is not None
                own[number], _ = self.system.condition(self.encoders.mllm, item.prefix)
                item.prefix = None
        for number, condition_BTE in self._to_first_stage(items, own).items():
            items[number].condition_BTE = condition_BTE.requires_grad_()

        def backward() -> None:
            gradients = self._to_owners(items)
            torch.autograd.backward(list(own.values()), [gradients[number] for number in own])

        return backward

    def _blank(self, indices: Sequence[int], size_px: tuple[int, int]) -> MicroBatch:
        """A micro-batch that another rank encodes, with room for its latents."""
        shapes, dtype = self.system.shapes, torch.promote_types(self._dtype, torch.float32)
        rows, columns = (side // shapes.token_px for side in size_px)
        room = len(indices), rows * columns, shapes.token_channels
        latent = torch.empty(room, dtype=dtype, device=self.mesh.device)
        queries = self.system.config.condition.queries
        return MicroBatch(torch.tensor(indices), latent, (rows, columns), queries)

    def _route_attend(self, items: Sequence[MicroBatch], made: Mapping[int, MicroBatch]) -> None:
        """Tell all ranks the number of condition tokens and which of them count, where that varies."""
        if self.system.config.condition.condition_tokens == "queries":
            return
        tokens = torch.tensor(
            [item.condition_tokens if number in made else 0 for number, item in enumerate(items)],
            device=self.mesh.device,
        )
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=self.mesh.groups.mp)
        masks = []
        for item, count in zip(items, tokens.tolist(), strict=True):
            item.condition_tokens = count
            mask = item.attend_BT
            if mask is None:
                mask = torch.empty(len(item.index_B), count, dtype=torch.bool, device=self.mesh.device)
            masks.append(mask.to(torch.uint8).contiguous())
        self._broadcast(masks)
        for item, mask in zip(items, masks, strict=True):
            item.attend_BT = mask.bool()

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Each micro-batch's tensor from its owner to the whole model-parallel group, in place."""
        works = [
            dist.broadcast(t, group=self.mesh.groups.mp, group_src=self.owner(number), async_op=True)
            for number, t in enumerate(tensors)
        ]
        for work in works:
            if work is not None:
                work.wait()

    def _to_first_stage(self, items: Sequence[MicroBatch], own: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """On the first stage the conditions of all micro-batches, as leaves of its graph; elsewhere none."""
        values = {number: condition_BTE.detach() for number, condition_BTE in own.items()}
        operations: list[Any] = []
        found: dict[int, Tensor] = {}
        for number, item in enumerate(items):
            for receiver in range(self.mesh.tp_size):
                operations += self._message(number, item, self.owner(number), receiver, values, found)
        _exchange(operations)
        return found

    def _to_owners(self, items: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """The gradients of this rank's own conditions. They are the same on all tensor-parallel ranks of the
        first stage, which take turns in sending them."""
        leaves = ((number, item.condition_BTE) for number, item in enumerate(items))
        values = {n: leaf.grad for n, leaf in leaves if leaf is not None and leaf.grad is not None}
        operations: list[Any] = []
        found: dict[int, Tensor] = {}
        for number, item in enumerate(items):
            source = number % self.mesh.tp_size
            operations += self._message(number, item, source, self.owner(number), values, found)
        _exchange(operations)
        return found

    def _message(
        self,
        number: int,
        item: MicroBatch,
        source: int,
        receiver: int,
        values: Mapping[int, Tensor],
        found: dict[int, Tensor],
    ) -> list[Any]:
        """What this rank has to do that `values[number]` of rank `source` becomes `found[number]` of rank
        `receiver`, both counted within the model-parallel group."""
        group, me = self.mesh.groups.mp, self.mesh.mp_rank
        if me == receiver == source:
            found[number] = values[number].clone()
        elif me == receiver:
            found[number] = self._room(item)
            return [dist.P2POp(dist.irecv, found[number], group=group, group_peer=source)]
        elif me == source:
            return [dist.P2POp(dist.isend, values[number].contiguous(), group=group, group_peer=receiver)]
        return []

    def _room(self, item: MicroBatch) -> Tensor:
        width = self.system.config.generator.condition_width
        return torch.empty(
            len(item.index_B), item.condition_tokens, width, dtype=self._dtype, device=self.mesh.device
        )


def _exchange(operations: list[Any]) -> None:
    """Run the noted messages; both sides note them in the order of micro-batches."""
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
