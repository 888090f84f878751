"""Attention of few queries over ragged keys, shared by masked_cross_attention and prefix_attention.

Maths, shapes and numerics are those of `ragged_attention_kernels`. Here are the reference, other providers,
the operator of torch.library, and the choice between them:

    triton  the kernels: no padding, no copy, gradients only of what asks for them
    flash   flash-attn's varlen kernels (fp16, bf16, no key mask); prefix and own keys are copied side by side
    sdpa    PyTorch's attention: a sample at a time on CPU, padded to the longest prefix on CUDA
    eager   the reference: padded, scores in memory

B samples, Q queries, T prefix rows of all samples, P rows of the longest prefix, H query heads, G key heads,
K numbers a head, S = B + 1.
"""

import importlib.util
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from iomm_kernels import launch
from iomm_kernels.ragged_attention_kernels import LOG2_E, launch_backward, launch_forward

PROVIDERS = ("auto", "triton", "flash", "sdpa", "eager")
TRITON_HEAD_SIZE = 128  # largest that the kernels hold without spilling

log = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()


class Call(NamedTuple):
    """One call. `own` keys and values are visible causally, prefix ones to every query."""

    q_BQHK: Tensor
    k_TGK: Tensor
    v_TGK: Tensor
    own_k_BQGK: Tensor | None
    own_v_BQGK: Tensor | None
    cu_S: Tensor
    shown_T: Tensor | None
    longest: int
    scale: float


def make_call(
    q_BQHK: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor | None, Tensor | None],
    cu_S: Tensor,
    longest: int | None,
    shown_T: Tensor | None,
    scale: float | None,
) -> Call:
    """A call with its defaults filled in: as many keys as there are rows, scale 1 / sqrt(K)."""
    longest = len(prefix[0]) if longest is None else longest
    scale = 1 / math.sqrt(q_BQHK.shape[-1]) if scale is None else scale
    return Call(q_BQHK, *prefix, *own, cu_S, shown_T, longest, scale)


# reference and PyTorch's attention


def _padded(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, P [+ Q], G, K), P at least 1, and visible_BQP: each sample's own rows, without
    asking the device for a length. Rows outside of a sample are zeros."""
    B, Q = call.q_BQHK.shape[:2]
    slot_P = torch.arange(max(1, call.longest), device=call.cu_S.device)
    inside_BP = slot_P < (call.cu_S[1:] - call.cu_S[:-1])[:, None]
    row_BP = torch.where(inside_BP, call.cu_S[:-1, None] + slot_P, len(call.k_TGK)).long()
    k_BPGK, v_BPGK = (functional.pad(x, (0, 0, 0, 0, 0, 1))[row_BP] for x in (call.k_TGK, call.v_TGK))
    if call.shown_T is not None:
        inside_BP = inside_BP & functional.pad(call.shown_T, (0, 1))[row_BP]
    visible_BQP = inside_BP[:, None].expand(B, Q, -1)
    if call.own_k_BQGK is not None and call.own_v_BQGK is not None:
        causal_QQ = torch.ones(Q, Q, dtype=torch.bool, device=call.cu_S.device).tril()
        visible_BQP = torch.cat((visible_BQP, causal_QQ.expand(B, -1, -1)), dim=2)
        k_BPGK, v_BPGK = torch.cat((k_BPGK, call.own_k_BQGK), 1), torch.cat((v_BPGK, call.own_v_BQGK), 1)
    return k_BPGK, v_BPGK, visible_BQP


def reference(call: Call) -> Tensor:
    """o_BQHK in plain PyTorch, any floating dtype, differentiable in q and all keys and values."""
    return _eager(call)[0]


def _eager(call: Call) -> tuple[Tensor, Tensor]:
    """o_BQHK and lse_BHQ, base 2."""
    k, v, visible_BQP = _padded(call)
    k, v = (x.repeat_interleave(call.q_BQHK.shape[2] // x.shape[2], dim=2) for x in (k, v))
    hidden = ~visible_BQP[:, None]
    score_BHQP = torch.einsum("bqhk,bphk->bhqp", call.q_BQHK * call.scale, k).masked_fill(hidden, -torch.inf)
    top_BHQ1 = score_BHQP.detach().amax(-1, keepdim=True)
    top_BHQ1 = top_BHQ1.masked_fill(top_BHQ1 == -torch.inf, 0)  # no key: 0 everywhere
    p_BHQP = (score_BHQP - top_BHQ1).exp()
    total_BHQ1 = p_BHQP.sum(-1, keepdim=True)
    total_BHQ1 = total_BHQ1.masked_fill(total_BHQ1 == 0, 1)
    lse_BHQ = ((top_BHQ1 + total_BHQ1.log()) * LOG2_E)[..., 0].detach()
    return torch.einsum("bhqp,bphk->bqhk", p_BHQP / total_BHQ1, v), lse_BHQ.float()


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """PyTorch's attention on (B, rows, heads, K) with visible (B, Q, P)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    visible = visible[:, None]
    # A query without any key: let it see all, then blank it, so that no 0 / 0 enters the gradients.
    some = visible.any(-1, keepdim=True)
    o = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible | ~some, scale=scale, enable_gqa=gqa
    )
    return o.masked_fill(~some, 0).transpose(1, 2)


def sdpa(call: Call) -> Tensor:
    """PyTorch's attention. On CPU a sample at a time, so that short prefixes cost what they are long; on CUDA
    padded, so that nothing waits for the device."""
    if call.q_BQHK.device.type != "cpu" or torch.compiler.is_compiling() or not len(call.q_BQHK):
        return _attend(call.q_BQHK, *_padded(call), call.scale)
    bounds, rows = call.cu_S.tolist(), []
    for b, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own_k, own_v = (None if x is None else x[b : b + 1] for x in (call.own_k_BQGK, call.own_v_BQGK))
        shown = None if call.shown_T is None else call.shown_T[start:stop]
        cu_S = call.cu_S.new_tensor([0, stop - start])
        k, v = call.k_TGK[start:stop], call.v_TGK[start:stop]
        one = Call(call.q_BQHK[b : b + 1], k, v, own_k, own_v, cu_S, shown, stop - start, call.scale)
        rows.append(_attend(one.q_BQHK, *_padded(one), call.scale))
    return torch.cat(rows)


# flash-attn


def side_by_side(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values (T + B Q, G, K) and cu_S of [prefix | own] for each sample, without asking the device
    for a length. Padding rows of the prefix go behind the last sample."""
    row_T = torch.arange(len(call.k_TGK), device=call.cu_S.device, dtype=torch.int32)
    # flash-attn leaves the gradients of rows outside of all samples as the memory was: none go through.
    padding_T11 = (row_T >= call.cu_S[-1])[:, None, None]
    k_TGK, v_TGK = (x.masked_fill(padding_T11, 0) for x in (call.k_TGK, call.v_TGK))
    if call.own_k_BQGK is None or call.own_v_BQGK is None:
        return k_TGK, v_TGK, call.cu_S
    B, Q = call.q_BQHK.shape[:2]
    sample_T = torch.searchsorted(call.cu_S, row_T, right=True) - 1
    own_BQ = call.cu_S[1:, None] + torch.arange(Q, device=call.cu_S.device)
    own_BQ = own_BQ + Q * torch.arange(B, device=call.cu_S.device)[:, None]
    to = torch.cat((row_T + Q * sample_T, own_BQ.flatten())).long()
    pairs = ((k_TGK, call.own_k_BQGK), (v_TGK, call.own_v_BQGK))
    k, v = (torch.cat((a, b.flatten(0, 1))) for a, b in pairs)
    k, v = (torch.empty_like(x).index_copy(0, to, x) for x in (k, v))
    return k, v, call.cu_S + Q * torch.arange(B + 1, device=call.cu_S.device, dtype=torch.int32)


def flash(call: Call) -> Tensor:
    """flash-attn's varlen attention. Its causal mask is aligned to the last key, which is what own keys
    behind a prefix need."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    B, Q = call.q_BQHK.shape[:2]
    k, v, cu_S = side_by_side(call)
    own = call.own_k_BQGK is not None
    o = flash_attn_varlen_func(
        call.q_BQHK.flatten(0, 1), k, v, cu_seqlens_k=cu_S, max_seqlen_k=call.longest + Q * own,
        cu_seqlens_q=Q * torch.arange(B + 1, device=cu_S.device, dtype=torch.int32), max_seqlen_q=Q,
        softmax_scale=call.scale, causal=own, deterministic=True,
    )  # fmt: skip
    return o.unflatten(0, (B, Q))


# the operator of torch.library


def _kernel_inputs(call: Call) -> tuple[Any, ...]:
    """Contiguous tensors as the kernels take them. The interpreter computes bf16 wrongly: fp32 there."""
    wide = launch.interpreted() and call.q_BQHK.dtype == torch.bfloat16
    q, k, v, own_k, own_v = (None if x is None else (x.float() if wide else x).contiguous() for x in call[:5])
    own = None if own_k is None else (own_k, own_v)
    shown = None if call.shown_T is None else call.shown_T.contiguous()
    return q, k, v, own, call.cu_S.contiguous(), shown, call.scale


@torch.library.custom_op("iomm_kernels::ragged_attention", mutates_args=())
def _forward(
    q_BQHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, own_k_BQGK: Tensor | None, own_v_BQGK: Tensor | None,
    cu_S: Tensor, shown_T: Tensor | None, longest: int, scale: float, provider: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o_BQHK and lse_BHQ (fp32, base 2, 0 for a query without any key)."""
    call = Call(q_BQHK, k_TGK, v_TGK, own_k_BQGK, own_v_BQGK, cu_S, shown_T, longest, scale)
    chosen = launch.resolve("ragged_attention", provider, q_BQHK.device.type, q_BQHK.dtype)
    if chosen == "triton":
        o, lse = launch_forward(*_kernel_inputs(call))
        return o.to(q_BQHK.dtype), lse
    o, lse = _eager(call)
    return o.contiguous(), lse.contiguous()


@_forward.register_fake
def _(q, k, v, own_k, own_v, cu, shown, longest, scale, provider):
    B, Q, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Q), dtype=torch.float32)


@torch.library.custom_op("iomm_kernels::ragged_attention_backward", mutates_args=())
def _backward(
    q_BQHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, own_k_BQGK: Tensor | None, own_v_BQGK: Tensor | None,
    cu_S: Tensor, shown_T: Tensor | None, longest: int, scale: float, provider: str,
    lse_BHQ: Tensor, do_BQHK: Tensor, prefix: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, of the own keys and values where there are any, and of the prefix's if asked for."""
    call = Call(q_BQHK, k_TGK, v_TGK, own_k_BQGK, own_v_BQGK, cu_S, shown_T, longest, scale)
    chosen = launch.resolve("ragged_attention_backward", provider, q_BQHK.device.type, q_BQHK.dtype)
    if chosen == "triton":
        q, k, v, own, cu, shown, _ = _kernel_inputs(call)
        do = do_BQHK.to(q.dtype).contiguous()
        bound = longest if prefix else None
        grads = launch_backward(q, k, v, own, cu, shown, scale, lse_BHQ, do, bound)
        return [g.to(q_BQHK.dtype) for g in grads]
    names = _differentiated(own_k_BQGK is not None, prefix)

    def function(*tensors: Tensor) -> Tensor:
        return reference(call._replace(**dict(zip(names, tensors, strict=True))))

    grads = launch.vjp(function, tuple(getattr(call, name) for name in names), do_BQHK)
    return [g.contiguous() for g in grads]


def _differentiated(own: bool, prefix: bool) -> list[str]:
    return [
        "q_BQHK",
        *(("own_k_BQGK", "own_v_BQGK") if own else ()),
        *(("k_TGK", "v_TGK") if prefix else ()),
    ]


@_backward.register_fake
def _(q, k, v, own_k, own_v, cu, shown, longest, scale, provider, lse, do, prefix):
    call = Call(q, k, v, own_k, own_v, cu, shown, longest, scale)
    inputs = (getattr(call, name) for name in _differentiated(own_k is not None, prefix))
    return [x.new_empty(x.shape) for x in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[7:]
    ctx.save_for_backward(*inputs[:7], output[1])


def _differentiate(ctx: Any, do_BQHK: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, lse = ctx.saved_tensors
    own, prefix = tensors[3] is not None, any(ctx.needs_input_grad[1:3])
    grads = _backward(*tensors, *ctx.settings, lse, do_BQHK, prefix)
    found = dict(zip(_differentiated(own, prefix), grads, strict=True))
    return *(found.get(name) for name in Call._fields), None


_forward.register_autograd(_differentiate, setup_context=_setup)


# choice


def _problem(provider: str, call: Call) -> str | None:
    """Why "triton" or "flash" cannot serve this call; None if it can."""
    q_BQHK, K = call.q_BQHK, call.q_BQHK.shape[-1]
    kind, dtype = q_BQHK.device.type, q_BQHK.dtype
    if provider == "triton":
        if K > TRITON_HEAD_SIZE:
            return f"holds heads of at most {TRITON_HEAD_SIZE} numbers, not {K}"
        if dtype == torch.float64:
            return "computes in fp32 and does not take float64"
        return launch.triton_problem(kind)
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed (pip install flash-attn)"
    if kind != "cuda":
        return f"serves CUDA tensors, not {kind}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    return None if call.shown_T is None else "takes no key mask (pack the keys)"


@torch.compiler.assume_constant_result
def _choose(
    name: str, provider: str, order: tuple[str, ...], problems: dict[str, str | None], kind: str
) -> str:
    if provider not in PROVIDERS:
        raise ValueError(f"{name}: provider {provider!r} is none of {', '.join(PROVIDERS)}.")
    if provider != "auto":
        if why := problems.get(provider):
            raise ValueError(
                f"{name}: provider {provider!r} was asked for, but it {why}. Use 'sdpa', 'eager' or 'auto'."
            )
        return provider
    if kind == "cpu":
        choice, why = "sdpa", "a sample at a time, without padding"
    else:
        choice = next((one for one in order if problems[one] is None), "sdpa")
        passed = [f"{one} {problems[one]}" for one in order if problems[one] is not None]
        why = "; ".join(passed) or f"preferred to {', '.join(o for o in order if o != choice)}"
    if (name, kind, choice) not in _logged:
        _logged.add((name, kind, choice))
        log.info("%s on %s: %s (%s)", name, kind, choice, why)
    return choice


def attend(name: str, call: Call, provider: str, order: tuple[str, ...]) -> Tensor:
    """o_BQHK by a provider; "auto" takes the first of `order` ("triton", "flash") that can serve.

    Raises:
        ValueError: shapes or dtypes do not fit, or the provider cannot serve here.
    """
    check(name, call)
    problems = {one: _problem(one, call) for one in order}
    chosen = _choose(name, provider, order, problems, call.q_BQHK.device.type)
    if chosen == "triton":
        return _forward(*call, chosen)[0]
    return {"flash": flash, "sdpa": sdpa, "eager": reference}[chosen](call)


def check(name: str, call: Call) -> None:
    """Raises ValueError where shapes or dtypes do not fit together."""
    (B, Q, H, K), prefix = call.q_BQHK.shape, call.k_TGK.shape
    G, cu_S = prefix[1], call.cu_S
    rules = {
        f"keys and values of one shape (T, G, {K}), G a divisor of {H} heads": (
            call.v_TGK.shape == prefix and prefix[2] == K and G > 0 and H % G == 0
        ),
        f"cu_seqlens int32 of shape ({B + 1},)": cu_S.shape == (B + 1,) and cu_S.dtype == torch.int32,
        f"a key mask bool of shape ({prefix[0]},)": call.shown_T is None
        or (call.shown_T.shape == prefix[:1] and call.shown_T.dtype == torch.bool),
        f"own keys and values of shape {(B, Q, G, K)}": all(
            x is None or x.shape == (B, Q, G, K) for x in call[3:5]
        ),
        f"one dtype, the queries' {call.q_BQHK.dtype}": all(
            x is None or x.dtype == call.q_BQHK.dtype for x in call[:5]
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            given = ", ".join(
                f"{field} {x.dtype} {tuple(x.shape)}"
                for field, x in zip(Call._fields[:7], call[:7], strict=True)
                if x is not None
            )
            raise ValueError(f"{name} needs {rule}. Given: {given}.")
