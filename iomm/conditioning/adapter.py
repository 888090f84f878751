"""RQA, the residual query adapter: learned queries read the MLLM's input embeddings (paper section 3.2;
METHOD.md section 2).

    q = q_0 + attention(norm(q_0), norm(c));  q = q + mlp(norm(q));  the MLLM then runs on [c | q]

28.7 M parameters at width 1536 with 256 queries. B samples, P prefix positions, T rows of a packed prefix, Q
queries, D MLLM channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm_kernels.masked_cross_attention import masked_cross_attention
from iomm_kernels.pack_tokens import Packed

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

    def forward(self, c: Tensor, where: Tensor | Packed) -> Tensor:
        """q_BQD from the prefix embeddings.

        Args:
            c: c_BPD, or c_TD of all samples in one sequence.
            where: attend_BP: positions with False (padding, hidden patches) are not read; or of a sequence
                where each sample begins and ends.
        """
        c = _norm(c.to(self.queries.dtype))
        samples = len(c) if isinstance(where, Tensor) else len(where.cu_S) - 1
        q_BQD = self.queries.expand(samples, -1, -1)
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1))
            for linear, x in ((self.query, _norm(q_BQD)), (self.key, c), (self.value, c))
        )
        if isinstance(where, Tensor):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            mask = where[:, None, None, :]
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        else:
            attended = masked_cross_attention(q, k, v, where.cu_S, where.longest)
        q_BQD = q_BQD + self.attention_out(attended.flatten(2))
        return q_BQD + self.mlp_out(functional.gelu(self.mlp_in(_norm(q_BQD)), approximate="tanh"))
