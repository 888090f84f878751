"""The trained half of the condition: adapter before the frozen multimodal LLM, connector behind it.

    q = q_0 + attention(norm(q_0), norm(c));  q = q + mlp(norm(q))          the residual query adapter (RQA)
    [c | q] -> frozen LM -> connector -> condition tokens of the transformer

B samples, P prompt positions, Q queries, T condition tokens, D LM channels, E condition channels.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-6


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ResidualQueryAdapter(nn.Module):
    """Learned queries that read the prompt's input embeddings."""

    def __init__(self, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.query, self.key, self.value, self.attention_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, c_BPD: Tensor) -> Tensor:
        """q_BQD."""
        c_BPD = _norm(c_BPD.to(self.queries.dtype))
        q_BQD = self.queries.expand(c_BPD.shape[0], -1, -1)
        attended = _attend(self.query(_norm(q_BQD)), self.key(c_BPD), self.value(c_BPD), self.heads)
        q_BQD = q_BQD + self.attention_out(attended)
        return q_BQD + self.mlp_out(functional.gelu(self.mlp_in(_norm(q_BQD)), approximate="tanh"))


class TransformerLayer(nn.Module):
    """Pre-norm bidirectional attention and a tanh-GELU MLP of ratio 4."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(h_BTD)).chunk(3, dim=-1)
        h_BTD = h_BTD + self.attention_out(_attend(q, k, v, self.heads))
        return h_BTD + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(h_BTD)), approximate="tanh"))


class Connector(nn.Module):
    """LM output states (B, T, D) -> condition tokens (B, T, E): `linear`, `mlp` or `transformer`."""

    def __init__(self, width: int, out_width: int, kind: str, layers: int, heads: int) -> None:
        super().__init__()
        depth = layers if kind == "transformer" else 0
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.hidden = nn.Linear(width, width) if kind == "mlp" else None
        self.out = nn.Linear(width, out_width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        h_BTD = h_BTD.to(self.out.weight.dtype)
        for layer in self.layers:
            h_BTD = layer(h_BTD)
        h_BTD = self.norm(h_BTD)
        if self.hidden is not None:
            h_BTD = functional.gelu(self.hidden(h_BTD), approximate="tanh")
        return self.out(h_BTD)


class QueryAdapter(ModelMixin, ConfigMixin):
    """Adapter and connector, with the prompts that they were trained with.

    Args:
        width: channels of the LM.
        out_width: channels of a condition token.
        queries: learned queries; 0: no adapter.
        condition_tokens: `queries`, or `all`: the prompt's output states too.
        aux_prompt: stands before an image's patch tokens (not used for text).
        null_prompt: what guidance pushes away from.
        max_caption_tokens: a longer prompt is an error.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 64,
        out_width: int = 64,
        queries: int = 16,
        adapter_heads: int = 1,
        condition_tokens: str = "queries",
        connector_kind: str = "transformer",
        connector_layers: int = 1,
        connector_heads: int = 1,
        aux_prompt: str = "",
        null_prompt: str = "",
        max_caption_tokens: int = 128,
    ) -> None:
        super().__init__()
        self.adapter = ResidualQueryAdapter(width, queries, adapter_heads) if queries else None
        self.connector = Connector(width, out_width, connector_kind, connector_layers, connector_heads)

    def forward(self, lm: nn.Module, c_BPD: Tensor) -> Tensor:
        """Condition tokens (B, T, E) of prompts of one length.

        Args:
            lm: the frozen causal language model.
            c_BPD: its input embeddings of the prompts.
        """
        prompt = c_BPD.shape[1]
        if self.adapter is not None:
            c_BPD = torch.cat((c_BPD, self.adapter(c_BPD).to(c_BPD.dtype)), dim=1)
        positions = torch.arange(c_BPD.shape[1], device=c_BPD.device).expand(c_BPD.shape[:2])
        states = lm(inputs_embeds=c_BPD, position_ids=positions, use_cache=False).last_hidden_state
        if self.config["condition_tokens"] == "queries":
            states = states[:, prompt:]
        return self.connector(states)
