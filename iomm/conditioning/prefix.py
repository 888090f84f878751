"""What stands before the queries, in two layouts, and what is left of it once the MLLM has read it.

    PaddedPrefix   rows (B, P, D) with gaps; what does not count is there and nobody attends to it
    PackedPrefix   one sequence (T, D) of the tokens that count, sample after sample   (mask mode `drop`)

B samples, P slots [ text | patches ] of a row, T packed rows, Q queries, D channels, F = D (1 + S)
numbers of a patch token with its S deepstack features, A rotary axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from iomm_kernels.pack_tokens import Packed, unpack_tokens


def _query_positions(length_B: Tensor, queries: int, axes: int) -> Tensor:
    """(B, Q, A): one after the other, the same on all axes."""
    position_BQ = length_B[:, None] + torch.arange(queries, device=length_B.device)
    return position_BQ[..., None].expand(-1, -1, axes)


@dataclass(frozen=True)
class PaddedPrefix:
    """Input embeddings in rows of one length. Rows may have gaps: only positions with `attend_BP` are ever
    attended to."""

    c_BPD: Tensor
    attend_BP: Tensor  # bool, True where a position counts
    position_BPA: Tensor  # rotary position of each token
    length_B: Tensor  # where the queries' positions begin
    deepstack_BPF: Tensor | None = (
        None  # F = S D: added behind the first S layers; 0 at text; None: nothing is
    )

    @property
    def read(self) -> tuple[Tensor, Tensor]:
        """What the query adapter reads: embeddings, and which of them count."""
        return self.c_BPD, self.attend_BP

    def query_positions(self, queries: int) -> Tensor:
        """(B, Q, A) rotary positions of the queries."""
        return _query_positions(self.length_B, queries, self.position_BPA.shape[-1])


@dataclass(frozen=True)
class PackedPrefix:
    """Input embeddings of the tokens that count, in one sequence."""

    packed: Packed  # rows of F numbers
    position_BPA: Tensor  # rotary position of each slot
    length_B: Tensor  # where the queries' positions begin
    width: int  # D

    @property
    def c_TD(self) -> Tensor:
        """Embeddings; zeros behind the last token."""
        return self.packed.tokens_TD[:, : self.width]

    @property
    def deepstack_TF(self) -> Tensor | None:
        """Deepstack features; None: the MLLM has none, or no sample an image."""
        features_TF = self.packed.tokens_TD[:, self.width :]
        return features_TF if features_TF.shape[1] else None

    @property
    def position_TA(self) -> Tensor:
        """Rotary position of each row; 0 behind the last token."""
        return self.packed.rows_of(self.position_BPA)

    @property
    def attend_BP(self) -> Tensor:
        """bool, True where a slot counts and its token has found a row."""
        return self.packed.row_BP >= 0

    @property
    def read(self) -> tuple[Tensor, Packed]:
        """What the query adapter reads: embeddings, and where each sample's begin and end."""
        return self.c_TD, self.packed

    def query_positions(self, queries: int) -> Tensor:
        """(B, Q, A) rotary positions of the queries."""
        return _query_positions(self.length_B, queries, self.position_BPA.shape[-1])

    def padded(self) -> PaddedPrefix:
        """The same prefix with each token back at its slot."""
        slots_BPF = unpack_tokens(self.packed.tokens_TD, self.packed)
        deepstack = None if self.deepstack_TF is None else slots_BPF[..., self.width :]
        c_BPD = slots_BPF[..., : self.width]
        return PaddedPrefix(c_BPD, self.attend_BP, self.position_BPA, self.length_B, deepstack)


Prefix = PaddedPrefix | PackedPrefix


@dataclass(frozen=True)
class EncodedPrefix:
    """What the query rows need of a prefix that has run: its keys and values, and its output states (no
    gradients)."""

    prefix: Prefix
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # a layer: (B, heads, P, K) each; packed (T, heads, K)
    states: Tensor  # (B, P, D); packed (T, D)

    @property
    def states_BPD(self) -> Tensor:
        """Output states at their slots."""
        if isinstance(self.prefix, PaddedPrefix):
            return self.states
        return unpack_tokens(self.states, self.prefix.packed)
