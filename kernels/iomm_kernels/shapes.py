"""Shapes of real training steps, for the benchmark and for the figures of the compile gate."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """One micro-batch of one GPU."""

    samples: int
    latent_tokens: int  # 16 x 16 pixels each
    latent_channels: int = 64  # numbers in a latent token
    condition_tokens: int
    hidden_size: int
    heads: int

    @property
    def tokens(self) -> int:
        """Of the generator's joint sequence."""
        return self.condition_tokens + self.latent_tokens

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads


# Hidden size, heads, samples, condition tokens. "cpu" is what the operators are compared at on a CPU.
_PRESETS = {
    "b": (1536, 12, 16, 256),
    "l": (1536, 12, 8, 256),
    "xl": (3840, 30, 4, 256),
    "cpu": (768, 12, 8, 0),
}


def step(preset: str, side_px: int) -> Step:
    """The shape of a preset "b", "l", "xl" or "cpu" at a square image of this side.

    Raises:
        ValueError: no such preset, or a side that is no multiple of 16.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset {preset!r} is none of {', '.join(_PRESETS)}.")
    if side_px < 16 or side_px % 16:
        raise ValueError(f"image side {side_px} px is not a positive multiple of 16, a latent token's side.")
    hidden_size, heads, samples, condition_tokens = _PRESETS[preset]
    return Step(
        samples=samples,
        latent_tokens=(side_px // 16) ** 2,
        condition_tokens=condition_tokens,
        hidden_size=hidden_size,
        heads=heads,
    )
