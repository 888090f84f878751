"""From samples to prefixes: the auxiliary prompt, captions, the null condition and the mask modes (METHOD.md
section 2).

    image sample   [ aux prompt | patch tokens, some masked ]      null: every patch token masked
    text sample    [ caption ]                                     null: [ null prompt ]
    edit           [ instruction | patch tokens, some masked ]     never trained; nulls: as of image samples

Rows of a batch share one layout, [ text slots | patch slots ]; slots that a row does not use are simply not
attended to. Mask mode `drop` packs the slots that count into one sequence.

B samples, A text slots, N patch slots, P = A + N, D channels, F numbers of a patch token (D, and its
deepstack features behind them where the MLLM has any: both are masked in one stroke).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from iomm.conditioning.mask import null_samples
from iomm.conditioning.mllm import FrozenMllm
from iomm.conditioning.prefix import PackedPrefix, PaddedPrefix, Prefix
from iomm.config import ConditionConfig
from iomm_kernels.mask_tokens import keep_tokens, mask_tokens
from iomm_kernels.pack_tokens import pack_tokens, packed_capacity

ROWS = 64  # packed prefixes have a multiple of so many rows on a GPU


class PrefixBuilder:
    """Builds prefixes for one MLLM and one set of condition settings.

    `dropped` counts, on the MLLM's device, the tokens of all its packed prefixes that found no row (mask mode
    `drop`, whose sequence is as long as one batch in 10^9 exceeds); nobody attends to them.
    """

    def __init__(self, mllm: FrozenMllm, config: ConditionConfig, kernels: str = "auto") -> None:
        self.mllm, self.config, self.kernels = mllm, config, kernels
        self.dropped = torch.zeros((), dtype=torch.int64, device=mllm.device)
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
        images = int((image_B & ~null_B.cpu()).sum())
        index_B, null_B = index_B.to(patches_BNF.device), null_B.to(patches_BNF.device)
        draw = (seed, config.mask_ratio, null_B, self.kernels)
        if config.mask_mode == "zero":
            return self._build(texts, mask_tokens(patches_BNF, index_B, *draw), image_B, None)
        keep_BN = keep_tokens(index_B, self.mllm.image_tokens, *draw)
        # Nothing waits for a GPU to count what the mask has kept; on a CPU counting is free and saves rows.
        on_cpu = keep_BN.device.type == "cpu"
        bound = None if on_cpu else (images * self.mllm.image_tokens, config.mask_ratio)
        return self._build(texts, patches_BNF, image_B, keep_BN, bound)

    def for_text(self, prompts: Sequence[str]) -> Prefix:
        """Prefix of generation from prompts."""
        return self._build(prompts, None, None, None)

    def for_images(self, patches_BNF: Tensor, keep_BN: Tensor) -> Prefix:
        """Prefix of a reconstruction; `keep_BN` all False is the null condition of image samples."""
        return self._with_images([self.config.aux_prompt] * len(patches_BNF), patches_BNF, keep_BN)

    def for_edits(
        self, patches_BNF: Tensor, keep_BN: Tensor, instructions: Sequence[str], *, aux_prompt: bool = False
    ) -> Prefix:
        """Prefix of an edit: where training has the auxiliary prompt stands the instruction.

        Args:
            aux_prompt: the auxiliary prompt stays, behind the instruction.
        """
        if len(instructions) != len(patches_BNF):
            raise ValueError(
                f"{len(instructions)} instructions for {len(patches_BNF)} images; give one an image."
            )
        behind = f" {self.config.aux_prompt}" if aux_prompt else ""
        return self._with_images([f"{text}{behind}" for text in instructions], patches_BNF, keep_BN)

    def _with_images(self, texts: Sequence[str], patches_BNF: Tensor, keep_BN: Tensor) -> Prefix:
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
        bound: tuple[int, float] | None = None,
    ) -> Prefix:
        """Rows [ text | patches ]; `image_B` says which rows have patches, `shown_BN` which of those may be
        attended to (None: all). `bound`, for mode `drop`: the number of patch tokens and the mask ratio that
        left `shown_BN` of them; None: they are counted, which waits for the device."""
        device = self.mllm.device
        ids = [torch.tensor(self.mllm.tokenize(text)) for text in texts]
        count_B = torch.tensor([len(i) for i in ids], device=device)
        ids_BA = pad_sequence(ids, batch_first=True, padding_value=0).to(device)
        c_BAD = self.mllm.embed(ids_BA)
        text_slots, width = c_BAD.shape[1:]
        if patches_BNF is None or image_B is None:
            image_B, bound, patches_BNF = None, (0, 0.0), c_BAD.new_empty(len(ids), 0, width)
            shown_BN = torch.empty(len(ids), 0, dtype=torch.bool, device=device)
        else:
            image_B, patches_BNF = image_B.to(device), patches_BNF.to(device, c_BAD.dtype)
            image_BN = image_B[:, None].expand(patches_BNF.shape[:2])
            shown_BN = image_BN if shown_BN is None else shown_BN.to(device) & image_BN
        position_BPA, length_B = self.mllm.positions(text_slots, count_B, image_B)
        if self.config.mask_mode == "drop":
            patches, ratio = bound or (int(shown_BN.sum()), 0.0)
            multiple = 1 if device.type == "cpu" else ROWS
            capacity = packed_capacity(sum(map(len, ids)), patches, ratio, multiple=multiple)
            text_BAF = functional.pad(c_BAD, (0, patches_BNF.shape[-1] - width))
            packed = pack_tokens(text_BAF, count_B, patches_BNF, shown_BN, capacity, self.kernels)
            self.dropped += packed.dropped
            return PackedPrefix(packed, position_BPA, length_B, width)
        attend_BA = torch.arange(text_slots, device=device) < count_B[:, None]
        deepstack_BPF = None
        if patches_BNF.shape[-1] > width:
            deepstack_BPF = functional.pad(patches_BNF[..., width:], (0, 0, text_slots, 0))
        c_BPD = torch.cat((c_BAD, patches_BNF[..., :width]), dim=1)
        attend_BP = torch.cat((attend_BA, shown_BN), dim=1)
        return PaddedPrefix(c_BPD, attend_BP, position_BPA, length_B, deepstack_BPF)
