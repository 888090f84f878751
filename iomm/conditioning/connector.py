"""The connector: MLLM output states -> condition tokens of the generator (OpenUni, arXiv 2505.23661;
METHOD.md section 2).

B samples, T positions, D MLLM channels, E condition channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import ConnectorConfig

NORM_EPS = 1e-6


class TransformerLayer(nn.Module):
    """Pre-norm bidirectional attention and a tanh-GELU MLP of ratio 4."""

    def __init__(self, width: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"condition.connector.heads {heads} does not divide the MLLM's width {width}. "
                "Choose a divisor."
            )
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.attention_out = nn.Linear(width, width, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.mlp_in = nn.Linear(width, 4 * width, dtype=dtype)
        self.mlp_out = nn.Linear(4 * width, width, dtype=dtype)

    def forward(self, h_BTD: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            self.qkv(self.attention_norm(h_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h_BTD = h_BTD + self.attention_out(attended.transpose(1, 2).flatten(2))
        return h_BTD + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(h_BTD)), approximate="tanh"))


class Connector(nn.Module):
    """`linear`; `mlp` (linear, GELU, linear); or `transformer`: layers at the MLLM's width, a norm, then a
    linear."""

    def __init__(
        self, config: ConnectorConfig, width: int, out_width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        depth = config.layers if config.kind == "transformer" else 0
        self.layers = nn.ModuleList(TransformerLayer(width, config.heads, dtype) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.hidden = nn.Linear(width, width, dtype=dtype) if config.kind == "mlp" else None
        self.out = nn.Linear(width, out_width, dtype=dtype)

    def forward(self, h_BTD: Tensor, attend_BT: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, E). `attend_BT`: True where a position counts; None: all do."""
        h_BTD = h_BTD.to(self.out.weight.dtype)
        mask = None if attend_BT is None else attend_BT[:, None, None, :]
        for layer in self.layers:
            h_BTD = layer(h_BTD, mask)
        h_BTD = self.norm(h_BTD)
        if self.hidden is not None:
            h_BTD = functional.gelu(self.hidden(h_BTD), approximate="tanh")
        return self.out(h_BTD)
