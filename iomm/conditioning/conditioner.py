"""The trained half of the condition: adapter before the frozen MLLM, connector behind it.

B samples, P prefix positions, Q queries, T condition tokens (Q, or P + Q), D MLLM channels, E condition
channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.conditioning.adapter import ResidualQueryAdapter
from iomm.conditioning.connector import Connector
from iomm.conditioning.mllm import FrozenMllm
from iomm.conditioning.prefix import Prefix
from iomm.config import ConditionConfig


class Conditioner(nn.Module):
    """c -> [c | RQA(c)] -> frozen MLLM -> connector -> condition tokens. The MLLM is an argument, not a
    submodule: it is neither trained nor saved."""

    def __init__(
        self,
        config: ConditionConfig,
        mllm_width: int,
        condition_width: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.adapter = (
            ResidualQueryAdapter(mllm_width, config.queries, config.adapter_heads, dtype)
            if config.queries
            else None
        )
        self.connector = Connector(config.connector, mllm_width, condition_width, dtype)

    def forward(self, mllm: FrozenMllm, prefix: Prefix) -> tuple[Tensor, Tensor | None]:
        """condition_BTE and attend_BT (None: every token counts)."""
        attend_BT = self.attend(prefix)
        return self.connector(self.states(mllm, prefix), attend_BT), attend_BT

    def attend(self, prefix: Prefix) -> Tensor | None:
        """Which condition tokens of this prefix count, (B, T); None: all. Known before the MLLM runs."""
        if self.adapter is None:
            return prefix.attend_BP
        if self.config.condition_tokens == "queries":
            return None
        return functional.pad(prefix.attend_BP, (0, self.config.queries), value=True)

    def states(self, mllm: FrozenMllm, prefix: Prefix) -> Tensor:
        """The MLLM's output states (B, T, D) that condition the generator, before the connector."""
        queries_only = self.config.condition_tokens == "queries"
        if self.adapter is None:
            return mllm.encode_prefix(prefix).states_BPD
        q_BQD = self.adapter(*prefix.read)
        if not self.config.prefix_split:
            states_BSD = mllm.full(q_BQD, prefix)
            return states_BSD[:, -q_BQD.shape[1] :] if queries_only else states_BSD
        encoded = mllm.encode_prefix(prefix)
        h_BQD = mllm.run_queries(q_BQD, encoded)
        return h_BQD if queries_only else torch.cat((encoded.states_BPD, h_BQD), dim=1)
