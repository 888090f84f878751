"""The frozen multimodal LLM, cut into a prefix without gradients and query rows with them (method.md section
2).

The LM is causal and the queries stand last, so the prefix's states do not depend on any trained parameter.
The prefix runs once under `no_grad` and leaves its keys and values; only the Q query rows run with gradients
against them. Outputs and gradients equal the naive full pass (`full`), which is kept for the comparison.

B samples, N patch tokens of an image, P prefix positions, Q queries, D channels.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iomm.config import MllmConfig


@dataclass(frozen=True)
class Prefix:
    """Input embeddings before the queries. Rows may have gaps: only positions with `attend_BP` are ever
    attended to."""

    c_BPD: Tensor
    attend_BP: Tensor  # bool, True where a position counts
    position_BP: Tensor  # rotary position of each token
    length_B: Tensor  # where the queries' positions begin

    def query_positions(self, queries: int) -> Tensor:
        return self.length_B[:, None] + torch.arange(queries, device=self.length_B.device)


@dataclass(frozen=True)
class EncodedPrefix:
    """What the query rows need of a prefix that has run: its keys and values, and its output states (no
    gradients)."""

    prefix: Prefix
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # a layer: (B, heads, P, K) each
    states_BPD: Tensor


class FrozenMllm:
    """InternVL in the transformers layout (`InternVLForConditionalGeneration`). Never trained, never in a
    checkpoint of ours.

    Args:
        config: where it lies.
        dtype: of weights and states.
    Raises:
        FileNotFoundError: nothing at `config.path`.
        ValueError: another architecture.
    """

    def __init__(self, config: MllmConfig, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoConfig, AutoTokenizer, InternVLForConditionalGeneration
        from transformers.image_processing_base import ImageProcessingMixin
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # one bar a rank would bury the run's own
        where = _existing(config)
        kind = AutoConfig.from_pretrained(where, revision=config.revision).model_type
        if kind != "internvl":
            raise ValueError(
                f"the MLLM at {where} is of type {kind!r}; this version takes 'internvl'. Set "
                "mllm.path to an InternVL folder."
            )
        loader: Any = InternVLForConditionalGeneration
        model = loader.from_pretrained(where, revision=config.revision, dtype=dtype)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.lm: Any = self.model.model.language_model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(where, revision=config.revision)
        self.max_caption_tokens = config.max_caption_tokens
        self.dtype, self.device = dtype, device
        self.width: int = self.lm.config.hidden_size
        vision = self.model.config.vision_config
        self.image_px: int = vision.image_size[0]
        self.image_tokens = int(
            (vision.image_size[0] // vision.patch_size[0] * self.model.config.downsample_ratio) ** 2
        )
        preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(where)
        self.mean, self.std = (
            torch.tensor(preprocessing[k], device=device).view(3, 1, 1)
            for k in ("image_mean", "image_std")
        )

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - one model lives as long as its run
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt or caption, without special tokens.

        Raises:
            ValueError: no tokens, or more than `max_caption_tokens`.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"the text {text!r} has no tokens. Give a prompt of at least one.")
        if len(ids) > self.max_caption_tokens:
            raise ValueError(
                f"the text {text[:60]!r}... has {len(ids)} tokens; the limit is mllm.max_caption_tokens = "
                f"{self.max_caption_tokens}. Shorten it or raise the limit."
            )
        return ids

    @torch.no_grad()
    def embed(self, ids_BP: Tensor) -> Tensor:
        """Input embeddings (B, P, D)."""
        return self.lm.get_input_embeddings()(ids_BP)

    @torch.no_grad()
    def vision(self, image_BCHW: Tensor) -> Tensor:
        """Patch tokens (B, N, D) of uint8 RGB images of any size, resized to the MLLM's with antialiasing."""
        x = image_BCHW.to(self.device, torch.promote_types(self.dtype, torch.float32)) / 255
        if x.shape[-2:] != (self.image_px, self.image_px):
            x = functional.interpolate(
                x, (self.image_px, self.image_px), mode="bicubic", antialias=True
            ).clamp(0, 1)
        return self.model.model.get_image_features(
            pixel_values=((x - self.mean) / self.std).to(self.dtype)
        ).pooler_output

    @torch.no_grad()
    def encode_prefix(self, prefix: Prefix) -> EncodedPrefix:
        """Run the prefix alone."""
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.lm.config)
        out = self.lm(
            inputs_embeds=prefix.c_BPD,
            attention_mask=prefix.attend_BP.long(),
            position_ids=prefix.position_BP,
            past_key_values=cache,
            use_cache=True,
        )
        return EncodedPrefix(
            prefix, tuple((layer.keys, layer.values) for layer in cache.layers), out.last_hidden_state
        )

    def run_queries(self, q_BQD: Tensor, encoded: EncodedPrefix) -> Tensor:
        """Output states (B, Q, D) of the query rows against the prefix's keys and values, with gradients to
        `q_BQD`."""
        from transformers import DynamicCache

        prefix, queries = encoded.prefix, q_BQD.shape[1]
        cache = DynamicCache(config=self.lm.config)
        for layer, (keys, values) in enumerate(encoded.keys_values):
            cache.update(keys, values, layer)
        return self.lm(
            inputs_embeds=q_BQD.to(self.dtype),
            attention_mask=functional.pad(prefix.attend_BP, (0, queries), value=True).long(),
            position_ids=prefix.query_positions(queries),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def full(self, q_BQD: Tensor, prefix: Prefix) -> Tensor:
        """The naive pass over [prefix | queries] with gradients: states (B, P + Q, D)."""
        queries = q_BQD.shape[1]
        return self.lm(
            inputs_embeds=torch.cat((prefix.c_BPD, q_BQD.to(self.dtype)), dim=1),
            attention_mask=functional.pad(prefix.attend_BP, (0, queries), value=True).long(),
            position_ids=torch.cat((prefix.position_BP, prefix.query_positions(queries)), dim=1),
            use_cache=False,
        ).last_hidden_state

    def vision_identity(self) -> str:
        """Hash of everything `vision` depends on; keys the feature cache."""
        digest = hashlib.sha256(
            f"{self.image_px} {self.mean.flatten()} {self.std.flatten()} {self.dtype}".encode()
        )
        for part in (self.model.model.vision_tower, self.model.model.multi_modal_projector):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _existing(config: MllmConfig) -> str:
    """`config.path`, checked when it looks like a folder."""
    path = Path(config.path)
    local = path.is_absolute() or config.path.startswith(".") or config.path.count("/") > 1
    if local and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no MLLM at {config.path}: {path / 'config.json'} is missing. Put a folder in the "
            "Hugging Face layout there, or set "
            "mllm.path to one (for instance a download of OpenGVLab/InternVL3-2B-hf)."
        )
    return config.path
