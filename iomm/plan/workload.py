"""One image's way through the system, in tokens.

L latent tokens of the image, N patch tokens of the MLLM, P prefix positions, Q queries, T condition tokens.
"""

import dataclasses
import re
from dataclasses import dataclass

from iomm.config import Config
from iomm.plan.shapes import CodecShape, MllmShape, codec_shape, latent_tokens, mllm_shape
from iomm_kernels.pack_tokens import packed_capacity

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
CACHEABLE = ("vae", "vit")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A configuration, the encoders' sizes, and what the planner varies besides.

    Every sample counts as an image sample. A text sample's prefix is at most as long and needs no ViT, so for
    `data.mix_ratio` below 1 the estimate is an upper bound.
    """

    config: Config
    mllm: MllmShape
    codec: CodecShape
    fused: bool = True  # element-wise operators as fused kernels; False: PyTorch's own, one after the other
    cached: frozenset[str] = frozenset()  # "vae", "vit": encoders whose outputs are read, not computed

    def __post_init__(self) -> None:
        unknown = self.cached - set(CACHEABLE)
        if unknown:
            raise ValueError(f"cannot cache {', '.join(sorted(unknown))}; what can: {', '.join(CACHEABLE)}.")
        channels = self.codec.latent_channels * self.config.codec.patch**2
        if channels != self.config.generator.token_channels:
            raise ValueError(
                f"the autoencoder {self.codec.name} has {channels} numbers in a token, "
                f"generator.token_channels is {self.config.generator.token_channels}. Make them equal."
            )

    @property
    def element_bytes(self) -> int:
        """Of a number in the compute precision."""
        return ELEMENT_BYTES[self.config.train.precision]

    @property
    def image_tokens(self) -> int:
        return latent_tokens(self.codec, self.config.data.image_px, self.config.codec.patch)

    @property
    def patch_tokens(self) -> int:
        return self.mllm.vit.tokens

    @property
    def prompt_tokens(self) -> int:
        """Of the auxiliary prompt: a token a word and a punctuation mark (an estimate; no tokenizer runs)."""
        return len(re.findall(r"\w+|[^\w\s]", self.config.condition.aux_prompt))

    @property
    def queries(self) -> int:
        return self.config.condition.queries

    def prefix_tokens(self, micro_batch: int) -> float:
        """Rows that the prefix takes, a sample of a micro-batch. Mode `drop` packs them."""
        condition = self.config.condition
        if condition.mask_mode != "drop":
            return self.prompt_tokens + self.patch_tokens
        images = round(micro_batch * (1 - condition.null_probability))
        tokens = self.prompt_tokens * micro_batch, self.patch_tokens * images
        return packed_capacity(*tokens, condition.mask_ratio) / micro_batch

    def condition_tokens(self, micro_batch: int) -> float:
        """T."""
        if self.config.condition.condition_tokens == "queries":
            return self.queries
        return self.prompt_tokens + self.patch_tokens + self.queries


def workload(config: Config, *, fused: bool = True, cached: frozenset[str] | None = None) -> Workload:
    """The workload of a configuration.

    Args:
        cached: None: those of `data.cache` if `data.cache_dir` is set, else none.
    Raises:
        ValueError: encoders whose sizes are not known, or that do not fit.
    """
    if cached is None:
        cached = frozenset(config.data.cache if config.data.cache_dir is not None else ())
    mllm, codec = mllm_shape(config.mllm), codec_shape(config.codec)
    return Workload(config=config, mllm=mllm, codec=codec, fused=fused, cached=cached)


def varied(work: Workload, **settings: object) -> Workload:
    """The same with other settings: `parallel__tp=2` changes `config.parallel.tp`, plain names the workload's
    own."""
    config, own = work.config, {}
    for name, value in settings.items():
        section, _, field = name.partition("__")
        if not field:
            own[name] = value
            continue
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return dataclasses.replace(work, config=config, **own)
