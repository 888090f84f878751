"""The frozen LM over a packed prefix: tokens of all samples in one sequence, no padding between them.

    prefix pass   (1, T, D)   causal within each sample, no gradients; its keys and values are kept
    query pass    (B, Q, D)   each row sees its sample's prefix, and causally the rows before it

Everything in the LM but attention works on each row alone, so only attention is replaced: transformers calls
`_attention` while one of the two passes runs, and the model's own attention otherwise. Rows behind the last
token stay finite and are read by nobody.

B samples, T packed rows, S = B + 1, Q queries, D channels, H query heads, G key heads, K numbers a head.

The CUDA paths have not yet run on a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iomm.conditioning.prefix import EncodedPrefix, PackedPrefix
from iomm_kernels.prefix_attention import prefix_attention

NAME = "iomm_ragged"  # to transformers
# (layer, q_RLHK, k_RLGK, v_RLGK, scale) -> o_RLHK of R rows of L tokens
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def encode_prefix(lm: Any, prefix: PackedPrefix) -> EncodedPrefix:
    """Run the prefix alone. Call it under `no_grad`: the loop on CPU writes in place.

    Raises:
        ValueError: the LM attends within a window.
    """
    packed = prefix.packed
    kept: list[tuple[Tensor, Tensor]] = []
    outside_T = packed.source_T < 0
    causal = _causal(packed.cu_S, packed.longest, len(outside_T), prefix.c_TD)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        assert layer == len(kept)
        k_TGK, v_TGK = k[0].contiguous(), v[0].contiguous()
        kept.append((k_TGK, v_TGK))
        return causal(q[0], k_TGK, v_TGK, scale).masked_fill(outside_T[:, None, None], 0)[None]

    states_1TD = _run(lm, prefix.c_TD[None], prefix.position_TA[None], attend, **_deepstack(prefix))
    return EncodedPrefix(prefix, tuple(kept), states_1TD[0])


def run_queries(
    lm: Any, q_BQD: Tensor, prefix: PackedPrefix, keys_values: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Output states (B, Q, D) of the query rows, with gradients to `q_BQD`.

    Raises:
        ValueError: the LM attends within a window.
    """
    packed = prefix.packed

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k_TGK, v_TGK = keys_values[layer]
        return prefix_attention(q, k, v, k_TGK, v_TGK, packed.cu_S, packed.longest, scale=scale)

    return _run(lm, q_BQD, prefix.query_positions(q_BQD.shape[1]), attend)


def _run(lm: Any, c_RLD: Tensor, position_RLA: Tensor, attend: Attend, **more: Any) -> Tensor:
    """Output states of the LM with this attention."""
    with _attending(lm.config):
        return lm(
            inputs_embeds=c_RLD,
            attention_mask=None,
            position_ids=position_ids(position_RLA),
            use_cache=False,
            ragged=attend,
            **more,
        ).last_hidden_state


@contextlib.contextmanager
def _attending(config: Any) -> Iterator[None]:
    """Transformers calls `_attention` within."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    ragged: Attend,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: heads before rows."""
    if sliding_window is not None:
        raise ValueError(
            f"layer {module.layer_idx} of the MLLM attends within a window of {sliding_window} tokens, which "
            "packed prefixes do not know. Set condition.mask_mode=hide."
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return ragged(module.layer_idx, q, k, v, scaling), None


def _causal(
    cu_S: Tensor, longest: int, rows: int, like: Tensor
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Causal attention within each sample, (q_THK, k_TGK, v_TGK, scale) -> o_THK. What rows behind the last
    token hold has no meaning and may be anything.

    Args:
        longest: a bound of a sample's length.
        like: a tensor of the device and dtype.
    """
    if like.device.type == "cpu":
        bounds = cu_S.tolist()
        return lambda q, k, v, scale: _causal_by_sample(q, k, v, bounds, scale)
    if like.dtype in (torch.float16, torch.bfloat16):
        return lambda q, k, v, scale: _causal_flash(q, k, v, cu_S, longest, scale)
    visible_TT = block_diagonal(cu_S, rows)
    return lambda q, k, v, scale: _sdpa(q, k, v, scale=scale, attn_mask=visible_TT)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """PyTorch's attention on (rows, heads, K)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **more)
    return o[0].transpose(0, 1)


def _causal_by_sample(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Tensor:
    """A sample at a time: costs what the samples are long, but waits for the device."""
    o_THK = torch.zeros_like(q)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        if stop > start:
            own = slice(start, stop)
            o_THK[own] = _sdpa(q[own], k[own], v[own], scale=scale, is_causal=True)
    return o_THK


def _causal_flash(q: Tensor, k: Tensor, v: Tensor, cu_S: Tensor, longest: int, scale: float) -> Tensor:
    """PyTorch's varlen attention (fp16, bf16)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, gqa = (cu_S, cu_S, longest, longest), q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)  # no auxiliary outputs were asked for
    return out


def block_diagonal(cu_S: Tensor, rows: int) -> Tensor:
    """visible_TT: the rows of the same sample up to itself; those behind the last sample see each other."""
    row_T = torch.arange(rows, device=cu_S.device, dtype=cu_S.dtype)
    sample_T = torch.searchsorted(cu_S, row_T, right=True)
    return (sample_T[:, None] == sample_T).tril()


def _deepstack(prefix: PackedPrefix) -> dict[str, Any]:
    """Arguments that add the deepstack features, to every row: text has zeros."""
    features_TF = prefix.deepstack_TF
    if features_TF is None:
        return {}
    rows = torch.ones(1, len(features_TF), dtype=torch.bool, device=features_TF.device)
    features_TSD = features_TF.unflatten(-1, (-1, prefix.width))
    return {"visual_pos_masks": rows, "deepstack_visual_embeds": list(features_TSD.unbind(1))}


def position_ids(position_BPA: Tensor) -> Tensor:
    """As transformers wants them: (B, P) for one axis, (3, B, P) for three."""
    return position_BPA[..., 0] if position_BPA.shape[-1] == 1 else position_BPA.permute(2, 0, 1)
