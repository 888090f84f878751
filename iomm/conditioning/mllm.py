"""The frozen multimodal LLM, cut into a prefix without gradients and query rows with them (METHOD.md section
2).

The LM is causal and the queries stand last, so the prefix's states do not depend on any trained parameter.
The prefix runs once under `no_grad` and leaves its keys and values; only the Q query rows run with gradients
against them. Outputs and gradients equal the naive full pass (`full`), which is kept for the comparison.

`open_mllm` loads InternVL, Qwen2.5-VL or Qwen3-VL. What they do with an image differs and is `vision.py`'s;
everything else is the same for all.

B samples, N patch tokens of an image, P prefix positions, Q queries, D channels, F = D (1 + S) numbers of a
patch token with its S deepstack features, A rotary axes.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iomm.conditioning import ragged
from iomm.conditioning.prefix import EncodedPrefix, PackedPrefix, PaddedPrefix, Prefix
from iomm.conditioning.ragged import position_ids
from iomm.conditioning.vision import InternVLVision, QwenVision, Vision
from iomm.config import MllmConfig
from iomm.errors import first_line

# By the `model_type` of config.json.
VISION: dict[str, Callable[[Any, int | None, Mapping[str, Any]], Vision]] = {
    "internvl": InternVLVision,
    "qwen2_5_vl": QwenVision,
    "qwen3_vl": QwenVision,
}
EXAMPLE = "OpenGVLab/InternVL3-2B-hf"


class FrozenMllm:
    """A multimodal LLM of the transformers library. Never trained, never in a checkpoint of ours.

    Args:
        model: `...ForConditionalGeneration` of one of the types in `VISION`, on its device.
        tokenizer: of the same folder.
        preprocessing: the image processor's settings.
        config: limits.
    Raises:
        ValueError: an image size that the model does not take.
    """

    def __init__(
        self, model: Any, tokenizer: Any, preprocessing: Mapping[str, Any], config: MllmConfig
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.lm: Any = model.model.language_model
        self.tokenizer: Any = tokenizer
        self.max_caption_tokens = config.max_caption_tokens
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.width: int = self.lm.config.hidden_size
        self.eye = VISION[model.config.model_type](model.model, config.image_px, preprocessing)
        self.image_px, self.image_tokens = self.eye.image_px, self.eye.tokens
        # How far an image moves on what follows it: past its last patch, the largest position on every axis.
        self.image_span = int(self.eye.offset_NA[-1].max()) + 1
        self.mean, self.std = (
            torch.tensor(preprocessing[k], device=self.device).view(3, 1, 1)
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
        """Patch tokens (B, N, F) of uint8 RGB images of any size, resized to the MLLM's with antialiasing."""
        x = image_BCHW.to(self.device, torch.promote_types(self.dtype, torch.float32)) / 255
        if x.shape[-2:] != (self.image_px, self.image_px):
            x = functional.interpolate(
                x, (self.image_px, self.image_px), mode="bicubic", antialias=True
            ).clamp(0, 1)
        return self.eye(((x - self.mean) / self.std).to(self.dtype))

    def positions(self, text_slots: int, count_B: Tensor, image_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotary positions of rows [text slots | patch slots].

        Args:
            count_B: text tokens of each row; its image follows them without a gap.
            image_B: which rows have an image; None: there are no patch slots.
        Returns:
            position_BPA, and where the positions of the queries begin, (B,).
        """
        axes = self.eye.offset_NA.shape[-1]
        text_BPA = torch.arange(text_slots, device=self.device)[:, None].expand(len(count_B), -1, axes)
        if image_B is None:
            return text_BPA, count_B
        patch_BNA = count_B[:, None, None] + self.eye.offset_NA
        return torch.cat((text_BPA, patch_BNA), dim=1), count_B + self.image_span * image_B

    @torch.no_grad()
    def encode_prefix(self, prefix: Prefix) -> EncodedPrefix:
        """Run the prefix alone."""
        if isinstance(prefix, PackedPrefix):
            return ragged.encode_prefix(self.lm, prefix)
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.lm.config)
        out = self.lm(
            inputs_embeds=prefix.c_BPD,
            attention_mask=prefix.attend_BP.long(),
            position_ids=position_ids(prefix.position_BPA),
            past_key_values=cache,
            use_cache=True,
            **self._deepstack(prefix, 0),
        )
        return EncodedPrefix(
            prefix, tuple((layer.keys, layer.values) for layer in cache.layers), out.last_hidden_state
        )

    def run_queries(self, q_BQD: Tensor, encoded: EncodedPrefix) -> Tensor:
        """Output states (B, Q, D) of the query rows against the prefix's keys and values, with gradients to
        `q_BQD`."""
        prefix, queries, q_BQD = encoded.prefix, q_BQD.shape[1], q_BQD.to(self.dtype)
        if isinstance(prefix, PackedPrefix):
            return ragged.run_queries(self.lm, q_BQD, prefix, encoded.keys_values)
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lm.config)
        for layer, (keys, values) in enumerate(encoded.keys_values):
            cache.update(keys, values, layer)
        return self.lm(
            inputs_embeds=q_BQD,
            attention_mask=functional.pad(prefix.attend_BP, (0, queries), value=True).long(),
            position_ids=position_ids(prefix.query_positions(queries)),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def full(self, q_BQD: Tensor, prefix: Prefix) -> Tensor:
        """The naive pass over [prefix | queries] with gradients: states (B, P + Q, D)."""
        queries = q_BQD.shape[1]
        prefix = prefix.padded() if isinstance(prefix, PackedPrefix) else prefix
        position_BPA = torch.cat((prefix.position_BPA, prefix.query_positions(queries)), dim=1)
        return self.lm(
            inputs_embeds=torch.cat((prefix.c_BPD, q_BQD.to(self.dtype)), dim=1),
            attention_mask=functional.pad(prefix.attend_BP, (0, queries), value=True).long(),
            position_ids=position_ids(position_BPA),
            use_cache=False,
            **self._deepstack(prefix, queries),
        ).last_hidden_state

    def _deepstack(self, prefix: PaddedPrefix, queries: int) -> dict[str, Any]:
        """Arguments that add the deepstack features to the prefix rows. Every prefix row is named, text rows
        with zeros, so that the shapes do not depend on the data."""
        if prefix.deepstack_BPF is None:
            return {}
        rows = prefix.deepstack_BPF.flatten(0, 1).unflatten(-1, (-1, self.width))
        prefix_BP = torch.ones_like(prefix.attend_BP)
        return {
            "visual_pos_masks": functional.pad(prefix_BP, (0, queries), value=False),
            "deepstack_visual_embeds": list(rows.unbind(1)),
        }

    def vision_identity(self) -> str:
        """Hash of everything `vision` depends on, on whatever device; keys the feature cache."""
        digest = hashlib.sha256(
            f"{self.image_px} {self.mean.flatten().cpu()} {self.std.flatten().cpu()} {self.dtype}".encode()
        )
        for part in self.eye.parts:
            for name, tensor in part.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def open_mllm(config: MllmConfig, dtype: torch.dtype, device: torch.device) -> FrozenMllm:
    """Load the MLLM at `config.path`, a folder in the Hugging Face layout or a hub name.

    Args:
        dtype: of weights and states.
    Raises:
        FileNotFoundError: nothing there, or no weights in safetensors; the message says what to download and
            where to put it.
        ValueError: another architecture, or an image size that the model does not take.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar a rank would bury the run's own
    path, revision = Path(config.path), config.revision
    local = path.is_dir() or path.is_absolute() or config.path.startswith(".") or config.path.count("/") > 1
    if local and not (path / "config.json").is_file():
        raise _missing(config, f"{path / 'config.json'} is missing")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(config.path, revision=revision)
        kind = settings.get("model_type")
        if kind not in VISION:
            raise ValueError(
                f"the MLLM at {config.path} is of type {kind!r}; known are {', '.join(VISION)}. "
                f"Set mllm.path to one of these (for instance {EXAMPLE})."
            )
        loader: Any = AutoModelForImageTextToText
        # Neither code nor pickles out of the model's folder: transformers would ask on a terminal.
        safe: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        model = loader.from_pretrained(config.path, dtype=dtype, use_safetensors=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(config.path, **safe)
        preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(config.path, revision=revision)
    except OSError as error:
        raise _missing(config, first_line(error)) from error
    return FrozenMllm(model.to(device), tokenizer, preprocessing, config)


def _missing(config: MllmConfig, what: str) -> FileNotFoundError:
    hub_name = config.path.count("/") == 1 and not config.path.startswith((".", "/"))
    name, folder = (config.path, "DIR") if hub_name else (EXAMPLE, config.path)
    what = f"there is no such folder, and as a hub name: {what}" if hub_name else what
    return FileNotFoundError(
        f"no MLLM at {config.path}: {what}. Download one where there is a network "
        f"(`hf download {name} --local-dir {folder}`) and set mllm.path={folder}."
    )
