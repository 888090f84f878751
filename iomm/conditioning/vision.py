"""From images to patch tokens, one class an architecture of the frozen multimodal LLM.

                 tokens of an image   rotary positions                           a patch token carries
    InternVL     its own size         one axis, one after the other              D numbers
    Qwen2.5-VL   any square           three axes (frame, row, column)            D numbers
    Qwen3-VL     any square           three axes                                 D (1 + S) numbers

Deepstack (Qwen3-VL): features of S earlier vision layers are added to the image positions behind the first S
layers of the LM. They stand behind the token's own D numbers in the same row of the same tensor, so whatever
masks, drops or caches a patch token does the same to them.

B samples, N patch tokens of an image, D channels of the LM, F = D (1 + S), A rotary axes, H x W pixels.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# A Qwen image without a given size: as many tokens a side as InternVL3 has.
QWEN_TOKENS_A_SIDE = 16


class Vision(Protocol):
    """The eye of an MLLM, on images of one size."""

    image_px: int  # side of the square image it sees
    tokens: int  # N
    offset_NA: Tensor  # rotary position of each patch token, less that of the first
    parts: tuple[nn.Module, ...]  # everything whose weights it uses

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Patch tokens (B, N, F) of normalised pixels."""
        ...


class InternVLVision:
    """ViT, pixel shuffle and projector; a patch token takes one position, as text does.

    Args:
        model: an `InternVLModel`.
        image_px: None, or the side that the model has anyway.
    Raises:
        ValueError: another side.
    """

    def __init__(self, model: Any, image_px: int | None, preprocessing: Mapping[str, Any]) -> None:
        vision = model.config.vision_config
        self.image_px: int = vision.image_size[0]
        if image_px not in (None, self.image_px):
            raise ValueError(
                f"mllm.image_px is {image_px}, but this InternVL sees images of {self.image_px} px only. "
                f"Set mllm.image_px to null or {self.image_px}."
            )
        self.tokens = int((vision.image_size[0] // vision.patch_size[0] * model.config.downsample_ratio) ** 2)
        self.offset_NA = torch.arange(self.tokens, device=model.device)[:, None]
        self.parts: tuple[nn.Module, ...] = (model.vision_tower, model.multi_modal_projector)
        self.model = model

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels_BCHW).pooler_output


class QwenVision:
    """ViT with merged patches; a patch token's position is (frame 0, row, column), and what follows the image
    goes on after the largest of them.

    Args:
        model: a `Qwen2_5_VLModel` or `Qwen3VLModel`.
        image_px: side of the square image; None: 16 tokens a side, brought inside the preprocessor's bounds.
        preprocessing: the image processor's settings.
    Raises:
        ValueError: a side that is not whole tokens, or that the preprocessor would not leave as it is.
    """

    def __init__(self, model: Any, image_px: int | None, preprocessing: Mapping[str, Any]) -> None:
        vision = model.config.vision_config
        self.patch: int = vision.patch_size
        self.merge: int = vision.spatial_merge_size
        self.frames: int = vision.temporal_patch_size  # a still image is repeated this often
        self.image_px = _qwen_side(image_px, self.patch * self.merge, preprocessing)
        side = self.image_px // (self.patch * self.merge)
        self.tokens = side**2
        row, column = torch.meshgrid(*[torch.arange(side, device=model.device)] * 2, indexing="ij")
        self.offset_NA = torch.stack((torch.zeros_like(row), row, column), dim=-1).view(-1, 3)
        self.parts: tuple[nn.Module, ...] = (model.visual,)
        self.model = model
        grid = self.image_px // self.patch
        self.grid_13 = torch.tensor([[1, grid, grid]], device=model.device)

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        out = self.model.get_image_features(
            self._patches(pixels_BCHW), image_grid_thw=self.grid_13.expand(len(pixels_BCHW), 3)
        )
        deepstack = getattr(out, "deepstack_features", None) or ()
        return torch.cat([torch.stack(part) for part in (out.pooler_output, *deepstack)], dim=-1)

    def _patches(self, x_BCHW: Tensor) -> Tensor:
        """Pixels -> rows (B * patches, C * frames * patch * patch): token by token, inside a token patch by
        patch, as Qwen's image processor orders them."""
        side, merge, patch = self.image_px // (self.patch * self.merge), self.merge, self.patch
        x = x_BCHW.unflatten(3, (side, merge, patch)).unflatten(2, (side, merge, patch))
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # sample, token row, column, patch row, column, colour, pixel
        x = x.unsqueeze(6).expand(*x.shape[:6], self.frames, *x.shape[6:])
        return x.reshape(len(x_BCHW) * (side * merge) ** 2, -1)


def _qwen_side(wanted_px: int | None, unit_px: int, preprocessing: Mapping[str, Any]) -> int:
    """Side of the square image: whole tokens of `unit_px`, its area within the preprocessor's bounds."""
    size = preprocessing.get("size") or {}
    least = preprocessing.get("min_pixels") or size.get("shortest_edge") or 1
    most = preprocessing.get("max_pixels") or size.get("longest_edge") or 2**62
    smallest = -(-_ceil_sqrt(least) // unit_px) * unit_px
    largest = int(most**0.5) // unit_px * unit_px
    side = max(smallest, min(largest, QWEN_TOKENS_A_SIDE * unit_px)) if wanted_px is None else wanted_px
    if side % unit_px or not smallest <= side <= largest:
        raise ValueError(
            f"mllm.image_px {side} must be a multiple of the {unit_px} px of one token, from {smallest} to "
            f"{largest} (the preprocessor's {least} to {most} pixels an image). Choose one, or null."
        )
    return side


def _ceil_sqrt(area: int) -> int:
    side = int(area**0.5)
    return side if side * side >= area else side + 1
