"""A judge in a local folder: a multimodal LLM that chats, through transformers, on one device.

Answers are greedy. One question is under way at a time: several at once, or a model larger than one device,
are what an inference server behind `judges.Endpoint` is for.
"""

import io
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from iomm.errors import first_line
from iomm.evaluation.benches.judges import MAX_TOKENS, Ask, model_identity
from iomm.evaluation.benches.layout import BenchError


class LocalJudge:
    """A `Judge`: asked in its own chat template, the text before the pictures as at an endpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """
        Args:
            folder: an image-text-to-text model with its processor and chat template, as Qwen2.5-VL's or
                InternVL's in the Hugging Face layout; safetensors, no code of its own.
        Raises:
            BenchError: a folder without the model, its processor or its template.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        def load(kind: Any, what: str, **settings: Any) -> Any:
            try:
                return kind.from_pretrained(folder, local_files_only=True, **settings)
            except (OSError, ValueError, ImportError) as error:
                raise BenchError(
                    f"no {what} can be had from --judge-folder {folder} ({first_line(error)}). Give a "
                    "folder in the Hugging Face layout, or serve the model and give --judge-url."
                ) from error

        self.device, self._one = device, threading.Lock()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._processor = load(AutoProcessor, "processor")
        if getattr(self._processor, "chat_template", None) is None:
            raise BenchError(
                f"the model in {folder} has no chat template. Give one that was trained to chat."
            )
        model = load(AutoModelForImageTextToText, "model", dtype=dtype, use_safetensors=True)
        self._model = model.to(device).eval()
        self.name = f"{folder.resolve().name} {model_identity(folder)}"

    @torch.no_grad()
    def ask(self, ask: Ask) -> str:
        """The model's answer, its special tokens left out."""
        content: list[dict[str, Any]] = [{"type": "text", "text": ask.text}]
        for png in ask.pngs:
            with Image.open(io.BytesIO(png)) as picture:
                content.append({"type": "image", "image": picture.convert("RGB")})
        with self._one:
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.device, dtype=self._model.dtype)
            out = self._model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        said = out[0, inputs["input_ids"].shape[1] :]
        return self._processor.decode(said, skip_special_tokens=True).strip()
