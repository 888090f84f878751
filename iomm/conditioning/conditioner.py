"""The trained half of the condition: adapter before the frozen MLLM, connector behind it.

B samples, P prefix positions, Q queries, T condition tokens (Q, or P + Q), D MLLM channels, E condition
channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.conditioning.adapter import ResidualQueryAdapter
from iomm.conditioning.connector import Connector
from iomm.conditioning.mllm import FrozenMllm, Prefix
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
        states_BTD, attend_BT = self.states(mllm, prefix)
        return self.connector(states_BTD, attend_BT), attend_BT

    def states(self, mllm: FrozenMllm, prefix: Prefix) -> tuple[Tensor, Tensor | None]:
        """The MLLM's output states that condition the generator, before the connector."""
        queries_only = self.config.condition_tokens == "queries"
        if self.adapter is None:
            return mllm.encode_prefix(prefix).states_BPD, prefix.attend_BP
        q_BQD = self.adapter(prefix.c_BPD, prefix.attend_BP)
        if self.config.prefix_split:
            encoded = mllm.encode_prefix(prefix)
            h_BQD = mllm.run_queries(q_BQD, encoded)
            states = h_BQD if queries_only else torch.cat((encoded.states_BPD, h_BQD), dim=1)
        else:
            states = mllm.full(q_BQD, prefix)
            states = states[:, -q_BQD.shape[1] :] if queries_only else states
        attend_BT = (
            None if queries_only else functional.pad(prefix.attend_BP, (0, q_BQD.shape[1]), value=True)
        )
        return states, attend_BT
