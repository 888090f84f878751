"""What the operators' records do not reach, under Triton's interpreter. A script, in a process of its own:

    TRITON_INTERPRET=1 python tests/kernels/interpret_masked.py

Fails with an assertion.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from iomm_kernels import ragged_attention  # noqa: E402
from iomm_kernels.mask_tokens import keep_reference, keep_tokens  # noqa: E402
from iomm_kernels.pack_tokens import pack_tokens, unpack_tokens  # noqa: E402
from iomm_kernels.prefix_attention import prefix_attention  # noqa: E402


def check_keep_tokens() -> None:
    index_B = torch.tensor([0, 1 << 40, 7])
    hidden_B = torch.tensor([False, False, True])
    for hidden in (None, hidden_B):
        kernel = keep_tokens(index_B, 101, 3, 0.4, hidden, provider="triton")
        assert torch.equal(kernel, keep_reference(index_B, 101, 3, 0.4, hidden))


def check_unpack_tokens() -> None:
    keep_BN = torch.tensor([[True, False, True], [False, False, True]])
    text_BAD, patch_BND = torch.randn(2, 2, 8), torch.randn(2, 3, 8)
    packed = pack_tokens(text_BAD, torch.tensor([2, 1]), patch_BND, keep_BN, 8, provider="triton")
    x_TD = torch.randn(8, 8)
    found = []
    for provider in ("triton", "eager"):
        leaf = x_TD.clone().requires_grad_()
        slots = unpack_tokens(leaf, packed, provider=provider)
        found.append((slots, *torch.autograd.grad(slots, leaf, torch.ones_like(slots))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(found[0][1].sum(1), (packed.source_T >= 0) * 8.0)


def check_frozen_prefix_costs_no_gradient() -> None:
    bounds: list[Any] = []
    launch = ragged_attention.launch_backward

    def recorded(*args: Any) -> Any:
        bounds.append(args[-1])
        return launch(*args)

    ragged_attention.launch_backward = recorded
    q, own, prefix = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 1, 16), torch.randn(4, 1, 16)
    q.requires_grad_()
    cu_S = torch.tensor([0, 4], dtype=torch.int32)
    prefix_attention(q, own, own, prefix, prefix, cu_S, 4, provider="triton").sum().backward()
    prefix.requires_grad_()
    prefix_attention(q, own, own, prefix, prefix, cu_S, 4, provider="triton").sum().backward()
    assert bounds == [None, 4]


if __name__ == "__main__":
    torch.manual_seed(0)
    check_keep_tokens()
    check_unpack_tokens()
    check_frozen_prefix_costs_no_gradient()
