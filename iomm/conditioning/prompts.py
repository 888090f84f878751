"""From samples to prefixes: the auxiliary prompt, captions, the null condition and the mask modes (method.md
section 2).

    image sample   [ aux prompt | patch tokens, some masked ]      null: every patch token masked
    text sample    [ caption ]                                     null: [ null prompt ]

Rows of a batch share one layout, [ text slots | patch slots ]; slots that a row does not use are simply not
attended to. B samples, A text slots, N patch slots, P = A + N, D channels, F numbers of a patch token (D,
and its deepstack features behind them where the MLLM has any: both are masked in one stroke).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from iomm.conditioning.mask import null_samples, pack_attended
from iomm.conditioning.mllm import FrozenMllm, Prefix
from iomm.config import ConditionConfig
from iomm_kernels.mask_tokens import keep_tokens, mask_tokens


class PrefixBuilder:
    """Builds prefixes for one MLLM and one set of condition settings."""

    def __init__(self, mllm: FrozenMllm, config: ConditionConfig, kernels: str = "auto") -> None:
        self.mllm, self.config, self.kernels = mllm, config, kernels
        for name in ("aux_prompt", "null_prompt"):
            try:
                mllm.tokenize(getattr(config, name))
            except ValueError as error:
                raise ValueError(f"condition.{name}: {error}") from error

    def for_training(
        self, captions: Sequence[str | None], patches_BNF: Tensor | None, seed: int, index_B: Tensor
    ) -> Prefix:
        """Prefix of a training batch; mask and null draws are functions of (seed, global sample index).

        Args:
            captions: a text sample's caption, None for an image sample.
            patches_BNF: patch tokens, read for image samples only; may be None if there are none.
        """
        config = self.config
        null_B = null_samples(seed, index_B, config.null_probability)
        texts = [
            config.aux_prompt if caption is None else config.null_prompt if null else caption
            for caption, null in zip(captions, null_B.tolist(), strict=True)
        ]
        image_B = torch.tensor([caption is None for caption in captions])
        if patches_BNF is None or not bool(image_B.any()):
            return self.for_text(texts)
        index_B, null_B = index_B.to(patches_BNF.device), null_B.to(patches_BNF.device)
        draw = (seed, config.mask_ratio, null_B, self.kernels)
        if config.mask_mode == "zero":
            return self._build(texts, mask_tokens(patches_BNF, index_B, *draw), image_B, None)
        return self._build(texts, patches_BNF, image_B, keep_tokens(index_B, self.mllm.image_tokens, *draw))

    def for_text(self, prompts: Sequence[str]) -> Prefix:
        """Prefix of generation from prompts."""
        return self._build(prompts, None, None, None)

    def for_images(self, patches_BNF: Tensor, keep_BN: Tensor) -> Prefix:
        """Prefix of a reconstruction; `keep_BN` all False is the null condition of image samples."""
        texts = [self.config.aux_prompt] * len(patches_BNF)
        image_B = torch.ones(len(patches_BNF), dtype=torch.bool)
        keep_BN = keep_BN.to(patches_BNF.device)
        if self.config.mask_mode == "zero":
            return self._build(texts, patches_BNF * keep_BN[..., None], image_B, None)
        return self._build(texts, patches_BNF, image_B, keep_BN)

    def _build(
        self,
        texts: Sequence[str],
        patches_BNF: Tensor | None,
        image_B: Tensor | None,
        shown_BN: Tensor | None,
    ) -> Prefix:
        """Rows [ text | patches ]; `image_B` says which rows have patches, `shown_BN` which of those may be
        attended to (None: all)."""
        device = self.mllm.device
        ids = [torch.tensor(self.mllm.tokenize(text)) for text in texts]
        count_B = torch.tensor([len(i) for i in ids], device=device)
        ids_BA = pad_sequence(ids, batch_first=True, padding_value=0).to(device)
        c = self.mllm.embed(ids_BA)
        slot_A = torch.arange(ids_BA.shape[1], device=device)
        attend, deepstack, text_slots = slot_A < count_B[:, None], None, len(slot_A)
        if patches_BNF is None or image_B is None:
            position, length_B = self.mllm.positions(text_slots, count_B, None)
        else:
            image_B, patches_BNF = image_B.to(device), patches_BNF.to(device, c.dtype)
            image_BN = image_B[:, None].expand(patches_BNF.shape[:2])
            shown_BN = image_BN if shown_BN is None else shown_BN.to(device) & image_BN
            width = c.shape[-1]
            if patches_BNF.shape[-1] > width:
                deepstack = functional.pad(patches_BNF[..., width:], (0, 0, text_slots, 0))
            c = torch.cat((c, patches_BNF[..., :width]), dim=1)
            attend = torch.cat((attend, shown_BN), dim=1)
            position, length_B = self.mllm.positions(text_slots, count_B, image_B)
        if self.config.mask_mode == "drop":
            extra = () if deepstack is None else (deepstack,)
            attend, c, position, *packed = pack_attended(attend, c, position, *extra)
            deepstack = packed[0] if packed else None
        return Prefix(c, attend, position, length_B, deepstack)
