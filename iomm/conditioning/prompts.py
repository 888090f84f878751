"""From samples to prefixes: the auxiliary prompt, captions, the null condition and the mask modes (method.md
section 2).

    image sample   [ aux prompt | patch tokens, some masked ]      null: every patch token masked
    text sample    [ caption ]                                     null: [ null prompt ]

Rows of a batch share one layout, [ text slots | patch slots ]; slots that a row does not use are simply not
attended to. B samples, A text slots, N patch slots, P = A + N, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from iomm.conditioning.mask import keep_tokens, null_samples, pack_attended
from iomm.conditioning.mllm import FrozenMllm, Prefix
from iomm.config import ConditionConfig


class PrefixBuilder:
    """Builds prefixes for one MLLM and one set of condition settings."""

    def __init__(self, mllm: FrozenMllm, config: ConditionConfig) -> None:
        self.mllm, self.config = mllm, config
        for name in ("aux_prompt", "null_prompt"):
            try:
                mllm.tokenize(getattr(config, name))
            except ValueError as error:
                raise ValueError(f"condition.{name}: {error}") from error

    def for_training(
        self, captions: Sequence[str | None], patches_BND: Tensor | None, seed: int, index_B: Tensor
    ) -> Prefix:
        """Prefix of a training batch; mask and null draws are functions of (seed, global sample index).

        Args:
            captions: a text sample's caption, None for an image sample.
            patches_BND: patch tokens, read for image samples only; may be None if there are none.
        """
        config = self.config
        null_B = null_samples(seed, index_B, config.null_probability)
        texts = [
            config.aux_prompt if caption is None else config.null_prompt if null else caption
            for caption, null in zip(captions, null_B.tolist(), strict=True)
        ]
        image_B = torch.tensor([caption is None for caption in captions])
        keep_BN = keep_tokens(seed, index_B, self.mllm.image_tokens, config.mask_ratio) & ~null_B[:, None]
        return self.build(texts, patches_BND, image_B, keep_BN)

    def for_text(self, prompts: Sequence[str]) -> Prefix:
        """Prefix of generation from prompts."""
        return self.build(prompts, None, None, None)

    def for_images(self, patches_BND: Tensor, keep_BN: Tensor) -> Prefix:
        """Prefix of a reconstruction; `keep_BN` all False is the null condition of image samples."""
        texts = [self.config.aux_prompt] * len(patches_BND)
        return self.build(texts, patches_BND, torch.ones(len(patches_BND), dtype=torch.bool), keep_BN)

    def build(
        self,
        texts: Sequence[str],
        patches_BND: Tensor | None,
        image_B: Tensor | None,
        keep_BN: Tensor | None,
    ) -> Prefix:
        """Rows [ text | patches ]; `image_B` says which rows have patches, `keep_BN` which of those are
        unmasked."""
        device = self.mllm.device
        ids = [torch.tensor(self.mllm.tokenize(text)) for text in texts]
        count_B = torch.tensor([len(i) for i in ids], device=device)
        ids_BA = pad_sequence(ids, batch_first=True, padding_value=0).to(device)
        c = self.mllm.embed(ids_BA)
        slot_A = torch.arange(ids_BA.shape[1], device=device)
        attend, position, length_B = slot_A < count_B[:, None], slot_A.expand_as(ids_BA), count_B
        if patches_BND is not None and image_B is not None and keep_BN is not None and bool(image_B.any()):
            image_B, keep_BN, n = image_B.to(device), keep_BN.to(device), patches_BND.shape[1]
            patches_BND = patches_BND.to(device, c.dtype)
            if self.config.mask_mode == "zero":
                patches_BND, shown_BN = patches_BND * keep_BN[..., None], torch.ones_like(keep_BN)
            else:
                shown_BN = keep_BN
            c = torch.cat((c, patches_BND), dim=1)
            attend = torch.cat((attend, shown_BN & image_B[:, None]), dim=1)
            position = torch.cat((position, count_B[:, None] + torch.arange(n, device=device)), dim=1)
            length_B = count_B + n * image_B
        if self.config.mask_mode == "drop":
            attend, c, position = pack_attended(attend, c, position)
        return Prefix(c, attend, position, length_B)
