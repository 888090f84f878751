"""RQA, the residual query adapter: learned queries read the MLLM's input embeddings (paper section 3.2;
method.md section 2).

    q = q_0 + attention(norm(q_0), norm(c));  q = q + mlp(norm(q));  the MLLM then runs on [c | q]

28.7 M parameters at width 1536 with 256 queries. B samples, P prefix positions, Q queries, D MLLM channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-6


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class ResidualQueryAdapter(nn.Module):
    """One cross-attention block with affine-free LayerNorm and a tanh-GELU MLP of ratio 4.

    Raises:
        ValueError: `width` is not divisible by `heads`.
    """

    def __init__(self, width: int, queries: int, heads: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"condition.adapter_heads {heads} does not divide the MLLM's width {width}. Choose a divisor."
            )
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(queries, width, dtype=dtype))
        self.query, self.key, self.value, self.attention_out = (
            nn.Linear(width, width, dtype=dtype) for _ in range(4)
        )
        self.mlp_in = nn.Linear(width, 4 * width, dtype=dtype)
        self.mlp_out = nn.Linear(4 * width, width, dtype=dtype)

    def forward(self, c_BPD: Tensor, attend_BP: Tensor) -> Tensor:
        """q_BQD from the prefix embeddings; positions with `attend_BP` False (padding, hidden patches) are
        not read."""
        dtype = self.queries.dtype
        c_BPD = _norm(c_BPD.to(dtype))
        q_BQD = self.queries.expand(c_BPD.shape[0], -1, -1)
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, _norm(q_BQD)), (self.key, c_BPD), (self.value, c_BPD))
        )
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=attend_BP[:, None, None, :])
        q_BQD = q_BQD + self.attention_out(attended.transpose(1, 2).flatten(2))
        return q_BQD + self.mlp_out(functional.gelu(self.mlp_in(_norm(q_BQD)), approximate="tanh"))
