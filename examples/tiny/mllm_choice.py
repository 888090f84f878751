"""Which step of the tiny MLLM's training to keep, decided on train emoji and scenes that were set aside."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from examples.tiny.mllm_data import CaptionedImage, Emoji, collate, training_sample
from examples.tiny.mllm_model import AUX_PROMPTS, NULL_PROMPT, MllmTraining, losses

ASIDE_SEED = 1_000_000  # added to the run's seed: scenes of another stream than the trained one
ASIDE_SCENES = 64


class BestStep:
    """Keeps the weights of the step that does best on what was not trained on."""

    def __init__(
        self, aside: Sequence[Emoji], tokenizer: PreTrainedTokenizerBase, settings: MllmTraining
    ) -> None:
        emoji = [CaptionedImage(image=e.image, caption=e.label) for e in aside]
        scenes = [training_sample(aside, settings.seed + ASIDE_SEED, 2 * i + 1) for i in range(ASIDE_SCENES)]
        self.batches = {"emoji": collate(emoji, tokenizer), "scenes": collate(scenes, tokenizer)}
        self.prompt_ids = tokenizer.encode(AUX_PROMPTS[0], add_special_tokens=False)
        self.null_ids = tokenizer.encode(NULL_PROMPT, add_special_tokens=False)
        self.settings = replace(
            settings, masked_fraction=0.0, null_fraction=0.0, label_smoothing=0.0, word_dropout=0.0
        )
        self.score, self.step = math.inf, 0
        self.weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def look(self, step: int, model: InternVLForConditionalGeneration) -> dict[str, float]:
        """Measures `model` and keeps its weights if they are the best yet.

        The score, in nats, is the sum of caption loss per token and alignment loss of the emoji set aside,
        and of the scenes' caption loss per token.
        """
        model.eval()
        measured: dict[str, float] = {}
        for kind, batch in self.batches.items():
            rng = np.random.default_rng(0)
            parts = losses(model, batch, self.prompt_ids, self.null_ids, self.settings, rng)
            measured |= {
                f"{kind}_caption": float(parts["image_caption"]),
                f"{kind}_align": float(parts["align"]),
            }
        model.train()
        score = measured["emoji_caption"] + measured["emoji_align"] + measured["scenes_caption"]
        if score < self.score:
            self.score, self.step = score, step
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return measured
