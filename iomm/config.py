"""Every setting of a run, as frozen dataclasses.

A configuration is a Python function that returns a `Config`; a variant is `dataclasses.replace(...)`; the
command line changes single values with `--set optimizer.lr=2e-4`. Building one touches no network, no file
and no GPU.

Units are in the names: `_px` pixels, `_steps` optimizer steps, `_images` samples, `_tokens` sequence
positions.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from iomm.settings import build, parse, require, unknown

# What an image may hold, where nothing else is said: training and `iomm shard` refuse the same files.
MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generator (METHOD.md section 3): FLUX's MM-DiT, or Z-Image's single-stream transformer."""

    family: Literal["flux", "z_image"] = "flux"
    hidden_size: int
    heads: int
    double_blocks: int  # separate weights for the condition and the image stream; z_image: 0
    single_blocks: int = 0  # shared weights
    refiner_blocks: int = 0  # z_image: blocks of each stream alone, before the two are joined
    mlp_ratio: float = 4.0  # z_image: SwiGLU of width 2/3 of this, which costs as much
    norm_affine: bool = True  # z_image: whether the blocks' RMSNorms have weights, as the stock class's do
    rope_axes: tuple[int, int, int] = (
        16,
        56,
        56,
    )  # head channels given to (frame, row, column); sum = head size
    rope_theta: float = 10_000.0
    token_channels: int = 64  # numbers in one latent token: 16 latent channels x 2 x 2 patch
    condition_width: int  # channels of a condition token as the connector hands it over
    predict: Literal["velocity", "clean"] = (
        "velocity"  # what the network's output means; the loss is on the velocity
    )
    # What imported FLUX.1 weights have and our own models do without. Nothing in a run varies them, so
    # training and sampling feed constants: a pooled text vector of zeros, and this guidance.
    pooled_width: int | None = None  # channels of the pooled text vector; None: no such input
    guidance_embedding: bool = False  # whether the guidance scale is an input (FLUX.1-dev)
    guidance_value: float = 3.5  # the constant fed to it; 3.5 is FLUX.1-dev's own

    def __post_init__(self) -> None:
        require(
            self.pooled_width is None or self.pooled_width > 0,
            f"generator.pooled_width {self.pooled_width} must be positive; null means no pooled input.",
        )
        require(
            self.hidden_size % self.heads == 0,
            f"generator.hidden_size {self.hidden_size} is not divisible by generator.heads {self.heads}. "
            "Choose heads that divide it.",
        )
        self._check_family()
        head_size = self.hidden_size // self.heads
        require(
            sum(self.rope_axes) == head_size and all(a % 2 == 0 for a in self.rope_axes),
            f"generator.rope_axes {self.rope_axes} must be even and sum to the head size {head_size}.",
        )

    def _check_family(self) -> None:
        fixed: dict[str, object] = {"refiner_blocks": 0, "norm_affine": True}
        if self.family == "z_image":
            fixed = {"double_blocks": 0, "mlp_ratio": 4.0, "pooled_width": None, "guidance_embedding": False}
            require(
                self.token_channels % 4 == 0,
                f"generator.token_channels {self.token_channels} is no multiple of 4, but a token of the "
                "z_image family is a 2 x 2 patch. Choose an autoencoder with codec.patch=2.",
            )
        for name, value in fixed.items():
            require(
                getattr(self, name) == value,
                f"generator.{name} {getattr(self, name)} does not fit generator.family={self.family}, which "
                f"has it at {value}. Leave it there, or choose the other family.",
            )


@dataclass(frozen=True, kw_only=True)
class MllmConfig:
    """The frozen multimodal LLM that turns images and captions into conditions."""

    path: str  # a folder in the Hugging Face layout, or a hub name
    revision: str | None = None  # hub revision; None: the folder as it is
    max_caption_tokens: int = 128  # a longer caption is never cut (data.long_captions); a prompt is an error
    image_px: int | None = None  # side of the image it sees; None: its own, Qwen: 16 x 16 tokens


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The frozen autoencoder between pixels and latents."""

    path: str  # a folder with a diffusers autoencoder, or a hub name
    revision: str | None = None
    patch: int = 2  # latent pixels a side in one token
    # Draw training latents from the autoencoder's distribution, anew each time an image is shown, by (seed,
    # sample index). False: its mean, as evaluation always takes it.
    sample: bool = False


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """What stands between the MLLM's output and the generator."""

    kind: Literal["linear", "mlp", "transformer"] = "transformer"
    layers: int = 6  # of kind "transformer"
    heads: int = 12  # of kind "transformer"


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """The condition (METHOD.md section 2): mask, residual query adapter, prompts, null."""

    queries: int = (
        256  # learned query tokens of the residual query adapter (RQA); 0: no adapter, condition_tokens = all
    )
    adapter_heads: int = 16
    condition_tokens: Literal["queries", "all"] = "queries"  # which output positions the generator attends to
    mask_mode: Literal["zero", "hide", "drop"] = "zero"
    mask_ratio: float = 0.85  # probability that a patch token is masked
    aux_prompt: str = "Generate an image that is identical to the reference image:"
    null_prompt: str = "Generate an image."
    null_probability: float = 0.1  # per sample, during training
    prefix_split: bool = (
        True  # run the frozen prefix without gradients; False: the naive full pass, for comparison
    )
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "null_probability"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"condition.{name} {value} must lie in [0, 1].")
        require(self.queries >= 0, f"condition.queries {self.queries} must not be negative.")
        require(
            self.queries > 0 or self.condition_tokens == "all",
            "condition.queries is 0, so there are no query positions to attend to. Set "
            "condition.condition_tokens=all.",
        )


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching (METHOD.md section 1)."""

    timestep: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0  # resolution shift s: t' = s t / (1 + (s - 1) t); 1 = none
    min_timestep: float = 0.05  # clamp of t in v = (x_t - x) / t when the network predicts the clean latent

    def __post_init__(self) -> None:
        require(self.shift > 0, f"flow.shift {self.shift} must be positive; 1 means no shift.")
        require(self.logit_std > 0, f"flow.logit_std {self.logit_std} must be positive.")
        require(0 < self.min_timestep < 1, f"flow.min_timestep {self.min_timestep} must lie in (0, 1).")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """WebDataset shards and how they mix."""

    # Paths or globs of tar shards, or of their indexes (`iomm shard`); also s3://..., gs://... Every sample
    # of `images` serves as an unlabeled image.
    images: tuple[str, ...]
    pairs: tuple[str, ...] = ()  # shards of which only the captioned samples serve as text-image pairs
    heldout: tuple[str, ...] = ()  # captioned shards no training step sees; for evaluation
    mix_ratio: float = 1.0  # lambda: share of image-only samples; 1 = images only, 0 = pairs only
    # Side of the square training image; of evaluation, and of the last stage of a progression.
    image_px: int = 512
    # center: the largest part of the wanted shape, resized; random: a part at the image's own resolution.
    crop: Literal["center", "random"] = "center"
    flip: bool = False  # exchange left and right in half of the images
    # Pictures of up to 41 shapes instead of squares, as many latent tokens each; needs indexes.
    buckets: bool = False
    # So many consecutive samples have one shape: a multiple of the images of a micro-batch over all ranks.
    # None: the global batch.
    bucket_block_images: int | None = None
    # Stages of resolution, (from_step, image_px): the first from step 0, the last of image_px. Steps are
    # counted from 0. Empty: image_px from the beginning.
    progression: tuple[tuple[int, int], ...] = ()
    # So many samples are shuffled among themselves, as 16 stretches of neighbours from anywhere (data/order).
    shuffle_block_images: int = 4096
    # A training caption of more than mllm.max_caption_tokens. skip: no pair, listed in quarantine; error: the
    # run ends.
    long_captions: Literal["skip", "error"] = "skip"
    # Keep the frozen encoders' outputs in this folder, by content hash and view, for later epochs and runs;
    # `iomm shard encode` fills it beforehand, best beside the shards. None: encode every time. data.flip
    # doubles it, each size of data.progression adds to it, data.crop=random is refused.
    cache_dir: str | None = None
    # Whose outputs: the autoencoder's mean (with codec.sample: and log-variance), the ViT's patch tokens.
    cache: tuple[Literal["vae", "vit"], ...] = ("vae", "vit")
    # exact: as computed, which is fp32 for the autoencoder; bf16: half of that, and the loss is that of
    # latents rounded to 8 bits of mantissa. `iomm plan` says what both take on disk.
    cache_precision: Literal["exact", "bf16"] = "exact"
    # cpu: libjpeg-turbo, for other formats Pillow; dali: NVIDIA DALI, on the GPU where there is one; auto:
    # DALI where there are both it and a GPU. Held-out images are always decoded by the reference, Pillow.
    decode: Literal["auto", "cpu", "dali"] = "auto"
    max_image_pixels: int = MAX_IMAGE_PIXELS  # an image with more by its header is a bad sample
    max_image_bytes: int = MAX_IMAGE_BYTES  # so is a larger file
    decode_threads: int = 4
    prefetch_batches: int = 2

    def __post_init__(self) -> None:
        require(0.0 <= self.mix_ratio <= 1.0, f"data.mix_ratio {self.mix_ratio} must lie in [0, 1].")
        require(
            self.mix_ratio == 1.0 or bool(self.pairs),
            f"data.mix_ratio {self.mix_ratio} asks for text-image pairs, but data.pairs is empty. "
            "Name shards with captions, or set data.mix_ratio=1.",
        )
        require(
            min(self.max_image_pixels, self.max_image_bytes) >= 1,
            f"data.max_image_pixels {self.max_image_pixels} and data.max_image_bytes {self.max_image_bytes} "
            "must be at least 1.",
        )
        self._check_order()
        require(
            self.cache_dir is None or 0 < len(set(self.cache)) == len(self.cache),
            f"data.cache {list(self.cache)} must name vae, vit or both once where data.cache_dir is set. "
            "Name one, or set data.cache_dir=null.",
        )
        require(
            self.cache_dir is None or self.crop == "center",
            "data.crop=random shows another part of an image each time, so a feature cache would grow with "
            "every step and never be read. Set data.cache_dir=null, or data.crop=center.",
        )

    def _check_order(self) -> None:
        for name in ("shuffle_block_images", "bucket_block_images"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} {value} must be at least 1.")
        require(
            self.bucket_block_images is None or self.buckets,
            f"data.bucket_block_images {self.bucket_block_images} means nothing without buckets. Set "
            "data.buckets=true, or data.bucket_block_images=null.",
        )
        if not self.progression:
            return
        steps, sides = [step for step, _ in self.progression], [px for _, px in self.progression]
        require(
            steps[0] == 0 and all(a < b for a, b in zip(steps, steps[1:], strict=False)),
            f"data.progression begins at steps {steps}: the first must be 0, each later than the one before.",
        )
        require(
            min(sides) >= 1 and sides[-1] == self.image_px,
            f"data.progression has sides of {sides} px: the last must be data.image_px, {self.image_px}.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerGroup:
    """Weights that get another learning rate or weight decay than the rest."""

    match: str  # shell pattern over weight names, e.g. "conditioner.*"; the first group that fits counts
    lr_scale: float = 1.0  # times optimizer.lr
    weight_decay: float | None = None  # None: as the rest

    def __post_init__(self) -> None:
        require(self.lr_scale >= 0, f"optimizer.groups lr_scale {self.lr_scale} of {self.match} is negative.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon with clipping, warm-up and an EMA of the weights (METHOD.md section 4)."""

    # muon: hidden matrices are orthogonalised (Newton-Schulz), everything else is AdamW's, with the same lr.
    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices; vectors have none
    groups: tuple[OptimizerGroup, ...] = ()
    muon_momentum: float = 0.95
    muon_newton_schulz_steps: int = 5
    clip_norm: float = 1.0
    warmup_steps: int = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = 0.0  # where "cosine" ends
    ema_decay: float | None = None  # of the averaged weights (EMA), e.g. 0.999; None: no EMA


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix products in 8 bits. Transformer Engine does them on a GPU; the local layers can emulate them
    (quantise, dequantise, multiply in the compute precision), slowly, to see what the numerics cost."""

    recipe: Literal["none", "delayed", "current", "blockwise"] = "none"
    # Linears that stay in the compute precision: shell patterns over weight names.
    keep: tuple[str, ...] = (
        "generator.image_in*",
        "generator.condition_in*",
        "generator.out*",
        "generator.time*",
        "*modulation*",
    )
    amax_history: int = 1024  # steps whose largest absolute value sets a delayed scale
    margin: int = 0  # powers of two between the largest value and the end of the format's range
    fp8_param: bool = False  # keep the weights themselves in fp8 (Transformer Engine only)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is laid over ranks. Data parallelism is world size / (tp * pp)."""

    tp: int = 1  # tensor parallelism
    pp: int = 1  # pipeline parallelism
    virtual_stages: int = 1  # chunks of a pipeline rank; > 1: interleaved 1F1B
    sequence_parallel: bool = False  # split the sequence between the tensor-parallel linears; needs tp > 1
    # What is computed again in the backward pass: nothing; all but matrix products and attention; all of a
    # block.
    recompute: Literal["none", "selective", "full"] = "none"
    # Where MLLM and autoencoder run: with the first pipeline stage, or their micro-batches dealt to all ranks
    # of the model-parallel group.
    encoders: Literal["first_stage", "shared"] = "first_stage"
    distributed_optimizer: bool = True  # shard the optimizer state over the data-parallel ranks
    backend: Literal["auto", "local", "te"] = (
        "auto"  # whose layers: Megatron-Core's own, or Transformer Engine's
    )

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "virtual_stages"):
            require(getattr(self, name) >= 1, f"parallel.{name} {getattr(self, name)} must be at least 1.")
        require(
            self.virtual_stages == 1 or self.pp > 1,
            f"parallel.virtual_stages {self.virtual_stages} needs a pipeline. Set parallel.pp > 1, or "
            "parallel.virtual_stages=1.",
        )
        require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel splits the sequence over tensor-parallel ranks, of which there is "
            "one. Set parallel.tp > 1, or parallel.sequence_parallel=false.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int
    global_batch_images: int
    micro_batch_images: int
    seed: int = 0
    precision: Literal["fp32", "fp64", "bf16"] = "bf16"  # compute; master weights are fp32 (fp64 for tests)
    init_from: str | None = (
        None  # a run or checkpoint whose weights (EMA if kept) start this run; stage 2 names stage 1 here
    )
    save_every_steps: int = 1000
    keep_last: int = 3  # checkpoints kept
    eval_every_steps: int = 1000
    eval_images: int = 128  # held-out samples of one evaluation
    sample_every_steps: int = 1000
    sample_steps: int = 25  # Euler steps of the sample grids
    sample_guidance: float = 3.0
    abort_after_bad_steps: int = 10  # consecutive NaN/Inf steps before the run stops
    log_every_steps: int = 10
    hang_timeout_s: float = 540.0  # no progress for so long: stacks are written, the rank ends; 0: never
    stall_notice_s: float = 30.0  # waiting for samples for so long is said, with the shard; 0: never
    straggler_every_steps: int = 100  # how often the ranks' times are compared; 0: never
    async_save: bool = False  # write checkpoints beside the training: a step waits for the copy only
    wandb: Literal["offline", "online", "disabled"] = "offline"
    prometheus_file: str | None = None  # figures for node_exporter's textfile collector: a file *.prom
    profile_steps: tuple[int, int] | None = None  # first and last step of a torch.profiler window, every rank

    def __post_init__(self) -> None:
        counts = ("steps", "global_batch_images", "micro_batch_images", "keep_last")
        for name in (*counts, *(f"{what}_every_steps" for what in ("log", "save", "eval", "sample"))):
            require(getattr(self, name) >= 1, f"train.{name} {getattr(self, name)} must be at least 1.")
        require(self.eval_images >= 2, f"train.eval_images {self.eval_images} must be at least 2.")
        require(
            self.global_batch_images % self.micro_batch_images == 0,
            f"train.global_batch_images {self.global_batch_images} is not a multiple of "
            f"train.micro_batch_images {self.micro_batch_images}. Change one of them.",
        )
        for name in ("hang_timeout_s", "stall_notice_s", "straggler_every_steps"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} {value} must not be negative; 0 turns it off.")
        first, last = self.profile_steps or (1, 1)
        require(
            1 <= first <= last,
            f"train.profile_steps {first}, {last} must be the first and the last step of a window, counted "
            "from 1. For three steps: [11, 13].",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    name: str
    generator: GeneratorConfig
    mllm: MllmConfig
    codec: CodecConfig
    data: DataConfig
    train: TrainConfig
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    # Who computes the memory-bound operators (iomm_kernels); auto: Triton on a GPU, compiled C++ on a CPU if
    # it was built, else plain PyTorch.
    kernels: Literal["auto", "triton", "csrc", "eager"] = "auto"
    out_dir: str = "runs"  # the run's folder is out_dir/name

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) / self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown key (with the nearest known one), a missing key, or a value of the wrong
                type.
        """
        return build(cls, data, "")

    def override(self, settings: list[str]) -> "Config":
        """Apply `a.b=c` settings in order. Values are JSON where they parse as such (`null`, `3e-4`,
        `[1,2]`), else text.

        Raises:
            ValueError: no `=`, an unknown key (did you mean), a wrong type, or a value that breaks a rule.
        """
        data = self.to_dict()
        for setting in settings:
            key, sep, raw = setting.partition("=")
            require(bool(sep), f"--set {setting!r} has no '='. Write it as --set optimizer.lr=2e-4.")
            *sections, name = key.strip().split(".")
            parent = node = data
            for depth, section in enumerate((*sections, name)):
                if not isinstance(node, dict) or section not in node:
                    known = list(node) if isinstance(node, dict) else []
                    raise ValueError(unknown(section, known, ".".join(sections[:depth])))
                parent, node = node, node[section]
            if isinstance(node, dict):
                raise ValueError(f"{key} is a section, not a value. Set one of its keys: {', '.join(node)}.")
            parent[name] = parse(raw)
        return Config.from_dict(data)
