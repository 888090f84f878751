"""How often memory-bound operators move their data: passes over (rows x width), reads and writes together.

One pass of a bf16 tensor of R rows and width D is 2 R D bytes. `eager` is PyTorch's operators one after the
other, as counted from the real functions (tests/plan/test_elementwise.py); `fused` reads inputs once and
writes outputs once. RMSNorm over heads counts as torch's fused CUDA operator in both.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """Of one family of operators in one block."""

    eager_forward: float
    eager_backward: float
    fused_forward: float
    fused_backward: float

    def __mul__(self, times: float) -> "Passes":
        return Passes(*(times * value for value in vars(self).values()))

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def forward(self, fused: bool) -> float:
        return self.fused_forward if fused else self.eager_forward

    def backward(self, fused: bool) -> float:
        return self.fused_backward if fused else self.eager_backward


MODULATE = Passes(6, 10, 2, 3)  # LayerNorm, x (1 + scale) + shift
GATED = Passes(5, 6, 3, 3)  # x + gate * y
GATED_MODULATE = Passes(11, 19, 4, 6)  # both in a row, and their gradients of x added
ACCUMULATE = Passes(0, 3, 0, 3)  # two gradients of one tensor are added
ROTATE = Passes(24.5, 26.5, 2, 2)  # of queries or of keys, in fp32
HEAD_NORM = Passes(2, 3, 0, 1)  # fused: in one pass with the rotation; backward reads the input again
GELU = Passes(2, 3, 2, 3)  # one operator either way
CAT = Passes(2, 0, 2, 0)
UNBIND = Passes(0, 6, 0, 6)  # gradients of q, k and v put side by side
SILU_TIMES = Passes(5, 9, 3, 5)  # silu(gate) * up
NORM = Passes(2, 3, 2, 3)  # RMSNorm over all channels
SCALE = Passes(2, 6, 2, 6)  # x * (1 + scale): Z-Image's norms are not fused with it

Families = Mapping[str, Passes]


def double_block(mlp_ratio: float) -> Families:
    """Per row and channel of FLUX's double block."""
    return {
        "norm and modulate": MODULATE + ACCUMULATE,
        "gated residual": GATED,
        "gated residual, norm and modulate": GATED_MODULATE,
        "query and key norm, rope": (HEAD_NORM + ROTATE) * 2,
        "joint sequence": CAT * 3 + UNBIND,
        "gelu": GELU * mlp_ratio,
        "bias gradients": Passes(0, 1, 0, 1) * (5 + mlp_ratio),
    }


def single_block(mlp_ratio: float) -> Families:
    """Per row and channel of FLUX's single block."""
    return {
        "norm and modulate": MODULATE,
        "gated residual": GATED + ACCUMULATE * 2 + Passes(3, 0, 3, 0),  # and attention + mlp
        "query and key norm, rope": (HEAD_NORM + ROTATE) * 2,
        "joint sequence": UNBIND,
        "gelu": GELU * mlp_ratio,
        "bias gradients": Passes(0, 1, 0, 1) * (4 + mlp_ratio),
    }


def z_image_block(mlp_share: float, modulated: bool) -> Families:
    """Per row and channel of Z-Image's block; `mlp_share`: inner channels of the SwiGLU over the width."""
    residual = GATED if modulated else Passes(3, 0, 3, 0)
    return {
        "norm and modulate": (NORM * 2 + (SCALE if modulated else Passes(0, 0, 0, 0))) * 2,
        "gated residual": (residual + ACCUMULATE) * 2,
        "query and key norm, rope": (HEAD_NORM + ROTATE) * 2,
        "joint sequence": UNBIND,
        "swiglu": SILU_TIMES * mlp_share + ACCUMULATE,
    }


def lm_layer(mlp_share: float, kv_share: float) -> Passes:
    """Per row and channel of a Qwen2 layer of the transformers library. Its operators stay eager in either
    case: they are not ours."""
    forward, backward = 54 + 10 * kv_share + 5 * mlp_share, 123.7 + 12 * kv_share + 9 * mlp_share
    return Passes(forward, backward, forward, backward)


VIT_LAYER = Passes(22, 0, 22, 0)  # InternVL's, with layer scales; forward only
CONNECTOR_LAYER = Passes(18, 45, 18, 45)
ADAPTER_QUERIES = Passes(18, 32, 18, 32)
ADAPTER_PREFIX = Passes(2, 2, 2, 2)
RESNET = Passes(13, 0, 13, 0)  # of the autoencoder: two group norms, two SiLUs, sum, division
