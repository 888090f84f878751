"""The whole generator as one thing: frozen encoders, trained conditioner and generator, and what is done
with them.

    Encoders  frozen: autoencoder, MLLM, feature cache                       never in a checkpoint
    System    trained: conditioner (adapter, connector) and generator         the checkpoint's weights

B samples, L latent tokens of C numbers, N patch tokens of F numbers (deepstack features included), T
condition tokens of E channels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from iomm.autoencoder import open_codec
from iomm.conditioning.conditioner import Conditioner
from iomm.conditioning.mllm import FrozenMllm, Prefix, open_mllm
from iomm.conditioning.prompts import PrefixBuilder
from iomm.config import Config, FlowConfig
from iomm.data.cache import FeatureCache
from iomm.data.loader import Batch
from iomm.flow.loss import velocity_loss
from iomm.flow.path import Prediction, grid_positions, interpolate, to_velocity, velocity_target
from iomm.flow.sampler import Guided, Method, Sampled, sample
from iomm.flow.timesteps import training_timesteps
from iomm.model.init import initialize
from iomm.model.mmdit import MMDiT, unvaried_inputs
from iomm.model.single_stream import SingleStreamDiT
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import DTYPES
from iomm.parallel.mesh import Mesh
from iomm.random import Stream, normal

FAMILIES = {"flux": MMDiT, "z_image": SingleStreamDiT}


@dataclass(frozen=True)
class Encoded:
    """A batch behind the frozen encoders."""

    batch: Batch
    latent_BLC: Tensor  # clean, normalised
    patches_BNF: Tensor  # the MLLM's patch tokens, before masking


class Encoders:
    """The frozen parts. With `data.cache_dir`, latents and patch tokens are kept by content hash."""

    def __init__(self, config: Config, device: torch.device) -> None:
        dtype = DTYPES[config.train.precision]
        # The autoencoder stays in fp32 (fp64): in bf16 its latents lose detail, and it is a few percent of a
        # step.
        self.codec = open_codec(config.codec, torch.promote_types(dtype, torch.float32), device)
        self.mllm = open_mllm(config.mllm, dtype, device)
        self.prefixes = PrefixBuilder(self.mllm, config.condition)
        self.grid = self.codec.grid(config.data.image_px)
        if self.codec.token_channels != config.generator.token_channels:
            raise ValueError(
                f"the autoencoder at {config.codec.path} has {self.codec.token_channels} numbers in a token, "
                f"generator.token_channels is {config.generator.token_channels}. Make them equal."
            )
        self.cache: FeatureCache | None = None
        if config.data.cache_dir is not None:
            parts = f"{self.codec.identity()} {self.mllm.vision_identity()} {config.data.image_px}"
            self.cache = FeatureCache(
                Path(config.data.cache_dir), hashlib.sha256(parts.encode()).hexdigest()[:16]
            )

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(L, C)."""
        return self.grid**2, self.codec.token_channels

    def encode(self, batch: Batch) -> Encoded:
        """Latents and patch tokens of a batch.

        Raises:
            ValueError: a caption that is too long or empty; the message names the sample.
        """
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            try:
                _ = caption is None or self.mllm.tokenize(caption)
            except ValueError as error:
                raise ValueError(f"sample {key}: {error}") from error
        if self.cache is None:
            return Encoded(batch, self.codec.encode(batch.image_BCHW), self.mllm.vision(batch.image_BCHW))
        for content_hash in self.cache.missing(batch.hashes):
            # One by one, so that a kept value does not depend on which images happened to share its batch.
            image_1CHW = batch.image_BCHW[batch.hashes.index(content_hash), None]
            latent, patches = self.codec.encode(image_1CHW)[0], self.mllm.vision(image_1CHW)[0]
            self.cache.put({content_hash: {"latent": latent.cpu(), "patches": patches.cpu()}})
        kept = self.cache.get(batch.hashes)
        device = self.codec.device
        return Encoded(batch, kept["latent"].to(device), kept["patches"].to(device))

    def noise(self, seed: int, stream: Stream, index_B: Tensor) -> Tensor:
        """Standard normal (B, L, C) of these sample indices."""
        length, channels = self.latent_shape
        flat = normal(seed, stream, index_B.to(self.codec.device), length * channels)
        return flat.view(-1, length, channels).to(self.codec.dtype)


class System(nn.Module):
    """Everything that is trained."""

    def __init__(self, config: Config, mllm_width: int, mesh: Mesh) -> None:
        super().__init__()
        generator, dtype = config.generator, DTYPES[config.train.precision]
        self.flow = config.flow
        self.predict: Prediction = generator.predict
        self.generator_config = generator
        self.backend_config = transformer_config(
            generator.hidden_size, generator.heads, dtype, mesh, config.parallel
        )
        self.conditioner = Conditioner(config.condition, mllm_width, generator.condition_width, dtype)
        self.generator = FAMILIES[generator.family](generator, Layers(self.backend_config, mesh))

    def velocity(self, x_t_BLC: Tensor, t_B: Tensor, condition: tuple[Tensor, Tensor | None]) -> Tensor:
        """The network's velocity at x_t, whatever it predicts; in the dtype of x_t or fp32, the wider."""
        side = int(x_t_BLC.shape[1] ** 0.5)
        positions_L3 = grid_positions(side, side, x_t_BLC.device)
        constants = unvaried_inputs(self.generator_config, len(t_B), t_B.device)
        out = self.generator(x_t_BLC, t_B, condition[0], positions_L3, condition[1], **constants)
        return to_velocity(out.to(x_t_BLC.dtype), x_t_BLC, t_B, self.predict, self.flow.min_timestep)

    def forward(self, mllm: FrozenMllm, prefix: Prefix, x_BLC: Tensor, z_BLC: Tensor, t_B: Tensor) -> Tensor:
        """Velocity loss of each sample, (B,), fp32 or better."""
        x_t_BLC = interpolate(x_BLC, z_BLC, t_B)
        velocity_BLC = self.velocity(x_t_BLC, t_B, self.conditioner(mllm, prefix))
        return velocity_loss(velocity_BLC, velocity_target(x_BLC, z_BLC))


def build(config: Config, encoders: Encoders, mesh: Mesh) -> System:
    """The trained part with its initial weights, on the mesh's device."""
    system = System(config, encoders.mllm.width, mesh)
    initialize(system, config.train.seed, mesh.tp_rank, mesh.tp_size)
    return system.to(mesh.device)


def training_loss(
    system: nn.Module, encoders: Encoders, item: Encoded, flow: FlowConfig, seed: int
) -> Tensor:
    """Loss of each sample of a training batch; every draw is a function of (seed, global sample index).

    Args:
        system: the `System`, or a wrapper with the same forward.
    """
    index_B = item.batch.index_B
    prefix = encoders.prefixes.for_training(item.batch.captions, item.patches_BNF, seed, index_B)
    noise = encoders.noise(seed, Stream.NOISE, index_B)
    t_B = training_timesteps(flow, seed, index_B.to(noise.device))
    return system(encoders.mllm, prefix, item.latent_BLC, noise, t_B)


@torch.no_grad()
def generate(
    system: System,
    encoders: Encoders,
    prefix: Prefix,
    null: Prefix,
    noise_BLC: Tensor,
    *,
    steps: int,
    guidance: float,
    method: Method = "euler",
) -> Sampled:
    """Latents for a condition, guided against the null condition. The conditions are computed once, not once
    a step."""
    conditional = system.conditioner(encoders.mllm, prefix)
    unconditional = system.conditioner(encoders.mllm, null) if guidance != 1.0 else conditional
    velocity = Guided(
        lambda x, t: system.velocity(x, t, conditional),
        lambda x, t: system.velocity(x, t, unconditional),
        guidance,
    )
    return sample(velocity, noise_BLC, steps=steps, method=method, shift=system.flow.shift)


def paint(
    system: System,
    encoders: Encoders,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    method: Method = "euler",
) -> Tensor:
    """Pictures of prompts, uint8 (B, 3, H, W). Picture i starts from the noise of (seed, i)."""
    builder = encoders.prefixes
    null = builder.for_text([builder.config.null_prompt] * len(prompts))
    noise = encoders.noise(seed, Stream.SAMPLE, torch.arange(len(prompts)))
    out = generate(
        system,
        encoders,
        builder.for_text(prompts),
        null,
        noise,
        steps=steps,
        guidance=guidance,
        method=method,
    )
    return encoders.codec.decode(out.x_BLC)


def reconstruct(
    system: System,
    encoders: Encoders,
    image_BCHW: Tensor,
    keep_BN: Tensor,
    *,
    seed: int,
    steps: int,
    guidance: float = 1.0,
    method: Method = "euler",
) -> Tensor:
    """Pictures generated from images' own masked patch tokens, uint8 (B, 3, H, W).

    Args:
        image_BCHW: uint8 RGB.
        keep_BN: True where a patch token is kept; all False is the null condition.
    """
    builder, patches_BNF = encoders.prefixes, encoders.mllm.vision(image_BCHW)
    prefix = builder.for_images(patches_BNF, keep_BN)
    null = builder.for_images(patches_BNF, torch.zeros_like(keep_BN))
    noise = encoders.noise(seed, Stream.SAMPLE, torch.arange(len(image_BCHW)))
    out = generate(system, encoders, prefix, null, noise, steps=steps, guidance=guidance, method=method)
    return encoders.codec.decode(out.x_BLC)
