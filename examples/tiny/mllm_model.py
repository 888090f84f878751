"""The tiny MLLM itself and what it is trained on: settings, InternVL's layout at toy size, the losses.

B batch            P patch tokens (16)   K prompt tokens   S caption tokens with </s>
L sequence length  D width               V vocabulary      Q queries
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import InternVLConfig, InternVLForConditionalGeneration

from examples.tiny.mllm_data import SIDE_PX, CaptionBatch
from examples.tiny.mllm_tokenizer import SPECIAL_IDS

AUX_PROMPTS = ("Generate an image that is identical to the reference image:", "The same as:")
NULL_PROMPT = "Generate an image."


@dataclass(frozen=True, kw_only=True)
class MllmTraining:
    """Settings of one run. The defaults are those of the shipped model."""

    steps: int = 1000
    batch_images: int = 32  # all emoji or all scenes, in turn
    learning_rate: float = 9e-4
    final_learning_rate: float = 2e-5
    warm_up_steps: int = 50
    weight_decay: float = 0.1
    label_smoothing: float = 0.1
    word_dropout: float = 0.1  # of the caption tokens that are read, zeroed
    clip_norm: float = 1.0
    seed: int = 0
    vocabulary: int = 1200
    vision_width: int = 144
    vision_layers: int = 6
    text_width: int = 192
    text_layers: int = 5
    heads: int = 4
    text_weight: float = 0.5
    align_weight: float = 0.5
    align_layer: int = 3
    align_temperature: float = 0.1
    masked_fraction: float = 0.25  # of image sequences, with a mask ratio uniform in 0 to 0.9
    null_fraction: float = 0.03  # of text sequences, replaced by the null prompt
    query_weight: float = 0.0  # of `query_loss`
    queries: int = 6  # of `query_loss`
    patch_words_weight: float = 0.0  # of `patch_words_loss`
    framed_fraction: float = 0.0  # of captions, worded as prompts are: "a photo of ..."


def build_model(settings: MllmTraining, vocabulary: int) -> InternVLForConditionalGeneration:
    """A fresh fp32 model with 16 visual tokens for 64 px images, initialised from `settings.seed`."""
    torch.manual_seed(settings.seed)
    config = InternVLConfig(
        vision_config={
            "hidden_size": settings.vision_width,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": settings.heads,
            "intermediate_size": 4 * settings.vision_width,
            "image_size": [SIDE_PX, SIDE_PX],
            "patch_size": [8, 8],
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.04,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": settings.text_width,
            "num_hidden_layers": settings.text_layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.heads,
            "intermediate_size": 8 * settings.text_width // 3,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
            "pad_token_id": SPECIAL_IDS["<pad>"],
            "bos_token_id": SPECIAL_IDS["<s>"],
            "eos_token_id": SPECIAL_IDS["</s>"],
        },
        image_token_id=SPECIAL_IDS["<IMG_CONTEXT>"],
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    positions = model.model.vision_tower.embeddings.position_embeddings
    torch.nn.init.normal_(positions, std=0.1)
    return model


def image_prefix(
    model: InternVLForConditionalGeneration,
    pixels_BCHW: torch.Tensor,
    prompt_ids: list[int],
    keep_BP: torch.Tensor | None = None,
) -> torch.Tensor:
    """The image condition [ aux prompt | patch tokens ] as input embeddings (B, K + 16, D).

    Patch tokens where `keep_BP` is False are multiplied by zero; None keeps all.
    """
    patches_BPD = model.model.get_image_features(pixels_BCHW).pooler_output
    if keep_BP is not None:
        patches_BPD = patches_BPD * keep_BP.unsqueeze(-1).to(patches_BPD.dtype)
    ids = torch.tensor(prompt_ids, dtype=torch.long, device=pixels_BCHW.device)
    prompt_BKD = model.get_input_embeddings()(ids).expand(pixels_BCHW.shape[0], -1, -1)
    return torch.cat([prompt_BKD, patches_BPD], dim=1)


def run_language_model(
    model: InternVLForConditionalGeneration, embeds_BLD: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The causal LM on input embeddings: final states and the output of layer `layer`, both (B, L, D).

    Padding stands to the right of everything that is read, so no attention mask is needed.
    """
    out = model.model.language_model(inputs_embeds=embeds_BLD, output_hidden_states=True, use_cache=False)
    return out.last_hidden_state, out.hidden_states[layer]


def token_losses(
    model: InternVLForConditionalGeneration,
    states_BSD: torch.Tensor,
    targets_BS: torch.Tensor,
    counted_BS: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy (B, S) in nats of each target token, 0 where `counted_BS` is False."""
    logits_BVS = model.lm_head(states_BSD).float().transpose(1, 2)
    losses_BS = functional.cross_entropy(
        logits_BVS, targets_BS, reduction="none", label_smoothing=label_smoothing
    )
    return losses_BS * counted_BS


def drop_words(
    words_BSD: torch.Tensor, length_B: torch.Tensor, rate: float, rng: np.random.Generator
) -> torch.Tensor:
    """Caption embeddings with a share of the tokens zeroed; the last one, whose state is aligned, stays."""
    count, width, _ = words_BSD.shape
    keep_BS = torch.from_numpy(rng.uniform(size=(count, width)) >= rate)
    keep_BS[torch.arange(count), length_B - 1] = True
    return words_BSD * keep_BS.unsqueeze(-1)


def alignment_loss(
    image_BD: torch.Tensor, text_BD: torch.Tensor, caption_BS: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Symmetric InfoNCE between the image and text states of the same samples.

    Equal captions in a batch are not held against each other.
    """
    similarity_BB = (
        functional.normalize(image_BD.float(), dim=-1) @ functional.normalize(text_BD.float(), dim=-1).T
    ) / temperature
    equal_BB = (caption_BS[:, None] == caption_BS[None]).all(dim=-1)
    other_BB = equal_BB & ~torch.eye(len(equal_BB), dtype=torch.bool)
    similarity_BB = similarity_BB.masked_fill(other_BB, float("-inf"))
    diagonal_B = torch.arange(len(equal_BB))
    return (
        functional.cross_entropy(similarity_BB, diagonal_B)
        + functional.cross_entropy(similarity_BB.T, diagonal_B)
    ) / 2


def losses(
    model: InternVLForConditionalGeneration,
    batch: CaptionBatch,
    prompt_ids: list[int],
    null_ids: list[int],
    settings: MllmTraining,
    rng: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """The losses of one batch (scalars, nats): `image_caption`, `text`, `align`, and where they have a weight
    `queries` and `patch_words`."""
    caption_BS, length_B = batch.caption_BS, batch.length_B
    count, width = caption_BS.shape
    ratio_B = np.where(
        rng.uniform(size=count) < settings.masked_fraction, rng.uniform(0, 0.9, size=count), 0.0
    )
    keep_BP = torch.from_numpy(rng.uniform(size=(count, 16)) >= ratio_B[:, None])
    prefix_BLD = image_prefix(model, batch.pixels_BCHW, prompt_ids, keep_BP)
    start = prefix_BLD.shape[1]
    words_BSD = drop_words(model.get_input_embeddings()(caption_BS), length_B, settings.word_dropout, rng)

    counted_BS = torch.arange(width) <= length_B[:, None]  # the caption and its </s>
    final_BLD, middle_BLD = run_language_model(
        model, torch.cat([prefix_BLD, words_BSD[:, :-1]], dim=1), settings.align_layer
    )
    smoothing = settings.label_smoothing
    image_losses_BS = token_losses(model, final_BLD[:, start - 1 :], caption_BS, counted_BS, smoothing)
    image_loss = image_losses_BS.sum() / counted_BS.sum()
    image_state_BD = middle_BLD[:, start - 1]

    null_B = torch.from_numpy(rng.uniform(size=count) < settings.null_fraction)
    text_BS, text_length_B = caption_BS.clone(), length_B.clone()
    if width > len(null_ids):
        text_BS[null_B] = torch.tensor([*null_ids, SPECIAL_IDS["</s>"]] + [0] * (width - len(null_ids) - 1))
        text_length_B[null_B] = len(null_ids)
    read_BSD = drop_words(model.get_input_embeddings()(text_BS), text_length_B, settings.word_dropout, rng)
    final_BSD, middle_BSD = run_language_model(model, read_BSD, settings.align_layer)
    follows_BS = torch.arange(width - 1) < text_length_B[:, None]
    text_losses_BS = token_losses(model, final_BSD[:, :-1], text_BS[:, 1:], follows_BS, smoothing)
    text_loss = text_losses_BS.sum() / follows_BS.sum()
    text_state_BD = middle_BSD[torch.arange(count), text_length_B - 1]
    align = alignment_loss(
        image_state_BD[~null_B], text_state_BD[~null_B], caption_BS[~null_B], settings.align_temperature
    )
    parts = {"image_caption": image_loss, "text": text_loss, "align": align}
    if settings.query_weight:
        parts["queries"] = query_loss(model, prefix_BLD, words_BSD, batch, settings, rng)
    if settings.patch_words_weight:
        parts["patch_words"] = patch_words_loss(model, prefix_BLD[:, -16:], batch)
    return parts


def query_loss(
    model: InternVLForConditionalGeneration,
    prefix_BLD: torch.Tensor,
    words_BSD: torch.Tensor,
    batch: CaptionBatch,
    settings: MllmTraining,
    rng: np.random.Generator,
) -> torch.Tensor:
    """How unlike the final states of random queries are behind an image and behind its caption.

    The generator's condition are such states. What a sample changes in them (the batch's mean is taken away)
    has to find its sample (`alignment_loss`) and to be the same vector (1 - cosine).
    """
    count, _, width = prefix_BLD.shape
    # The adapter's queries are longer than words or shorter, and differ a little from sample to sample.
    scale = float(model.get_input_embeddings().weight.detach().std() * np.exp(rng.uniform(-0.7, 1.5)))
    common_QD = rng.standard_normal((settings.queries, width))
    own_2BQD = rng.standard_normal((2, count, settings.queries, width))
    query_2BQD = scale * torch.from_numpy(common_QD + 0.3 * own_2BQD).to(words_BSD.dtype)

    behind_image_BLD, _ = run_language_model(
        model, torch.cat([prefix_BLD, query_2BQD[0].to(prefix_BLD.dtype)], dim=1), settings.align_layer
    )
    room_BQD = words_BSD.new_zeros(count, settings.queries, width)
    place_BQD = (batch.length_B[:, None] + torch.arange(settings.queries))[..., None].expand(-1, -1, width)
    text_BLD = torch.cat([words_BSD, room_BQD], dim=1).scatter(1, place_BQD, query_2BQD[1])
    behind_text_BLD, _ = run_language_model(model, text_BLD, settings.align_layer)

    image_BQD = behind_image_BLD[:, -settings.queries :].float()
    text_BQD = behind_text_BLD.float().gather(1, place_BQD)
    mean_QD = (image_BQD + text_BQD).mean(dim=0) / 2
    image_BF, text_BF = ((states_BQD - mean_QD).flatten(1) for states_BQD in (image_BQD, text_BQD))
    apart = 1 - functional.cosine_similarity(image_BF, text_BF, dim=-1).mean()
    return alignment_loss(image_BF, text_BF, batch.caption_BS, settings.align_temperature) + apart


def patch_words_loss(
    model: InternVLForConditionalGeneration, patches_BPD: torch.Tensor, batch: CaptionBatch
) -> torch.Tensor:
    """Cross-entropy in nats of the caption's tokens, in any order, given the mean patch token through the
    language model's own head: patch tokens then lie where the words for them do, and the residual query
    adapter, which reads both raw, meets nothing foreign in a caption."""
    log_chance_BV = model.lm_head(patches_BPD.mean(dim=1)).float().log_softmax(dim=-1)
    is_word_BS = torch.arange(batch.caption_BS.shape[1]) < batch.length_B[:, None]
    return -(log_chance_BV.gather(1, batch.caption_BS) * is_word_BS).sum() / is_word_BS.sum()
