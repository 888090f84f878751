"""Pictures from prompts with an exported iomm generator. Needs torch, transformers and diffusers.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    picture = pipe("a red ball", seed=0).images[0]

The same seed gives the picture that `iomm sample` paints: noise is Philox4x32-10 of (seed, number of the
prompt), the sampler is Euler, guidance is v_null + g (v - v_null).

B samples, L latent tokens of C numbers, T condition tokens of E channels. t = 1 is noise, t = 0 is data.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

_M32 = 0xFFFFFFFF
_SAMPLE_STREAM = 7


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m, for a in [0, 2^32) held in int64, without overflow."""
    p, q = (a & 0xFFFF) * m, (a >> 16) * m
    low = p + ((q & 0xFFFF) << 16)
    return ((q >> 16) + (low >> 32)) & _M32, low & _M32


def philox_normal(seed: int, samples: int, n: int) -> Tensor:
    """Standard normal fp32 (samples, n): Box-Muller on Philox4x32-10 (Salmon et al., SC 2011).

    key = the seed's two words, counter = (element // 4, sample, 0, stream)."""
    blocks = (n + 3) // 4
    c0 = torch.arange(blocks).expand(samples, blocks)
    c1 = torch.arange(samples)[:, None].expand(samples, blocks)
    c2, c3 = torch.zeros_like(c0), torch.full_like(c0, _SAMPLE_STREAM)
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(10):
        (h0, l0), (h1, l1) = _multiply(c0, 0xD2511F53), _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)
    u = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), 2.0 * math.pi * u[:, 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :n]


def pack(latent_BCHW: Tensor, patch: int) -> Tensor:
    """Latent -> tokens (B, H/p * W/p, C * p * p), row by row, channels first inside a token."""
    b, c, h, w = latent_BCHW.shape
    x = latent_BCHW.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpack(x_BLC: Tensor, patch: int) -> Tensor:
    """Inverse of `pack` for a square."""
    side = math.isqrt(x_BLC.shape[1])
    x = x_BLC.reshape(x_BLC.shape[0], side, side, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0], x.shape[1], side * patch, side * patch)


def predict(
    transformer: Any, x_BLC: Tensor, t_B: Tensor, condition_BTE: Tensor, patch: int, guidance: float | None
) -> Tensor:
    """The stock transformer's output for square noisy tokens, in iomm's time and sign; (B, L, C)."""
    x_BLC, condition_BTE = x_BLC.to(transformer.dtype), condition_BTE.to(transformer.dtype)
    if "ZImage" in type(transformer).__name__:
        # Z-Image's time is 0 at noise, and its output is the velocity with the other sign.
        latents = list(unpack(x_BLC, patch)[:, :, None])  # (C, one frame, H, W) each
        out = transformer(latents, 1 - t_B, list(condition_BTE), return_dict=False, patch_size=patch)[0]
        return -pack(torch.stack(list(out))[:, :, 0], patch)
    side, b = math.isqrt(x_BLC.shape[1]), x_BLC.shape[0]
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image_ids = torch.stack((torch.zeros_like(row), row, column), dim=-1).view(-1, 3).to(x_BLC)
    return transformer(
        hidden_states=x_BLC,
        encoder_hidden_states=condition_BTE,
        pooled_projections=x_BLC.new_zeros(b, transformer.config["pooled_projection_dim"]),
        timestep=t_B,
        guidance=None if guidance is None else x_BLC.new_full((b,), guidance),
        img_ids=image_ids,
        txt_ids=image_ids.new_zeros(condition_BTE.shape[1], 3),
        return_dict=False,
    )[0]


def decode_tokens(vae: Any, x_BLC: Tensor, patch: int) -> Tensor:
    """Normalised latent tokens -> pictures (B, 3, H, W) in [-1, 1]."""
    x_BLC, config = x_BLC.to(vae.device, vae.dtype), vae.config
    if hasattr(vae, "bn"):  # FLUX.2: statistics of each number of a token
        x_BLC = x_BLC * torch.sqrt(vae.bn.running_var + config["batch_norm_eps"]) + vae.bn.running_mean
    else:  # FLUX.1, or DC-AE, which has no shift
        x_BLC = x_BLC / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    return vae.decode(unpack(x_BLC, patch), return_dict=False)[0]


class IommPipeline(DiffusionPipeline):
    """Text -> frozen multimodal LLM with learned queries -> flow-matching transformer -> autoencoder.

    Args:
        prediction: what the transformer's output means, `velocity` or `clean`.
        min_timestep: clamp of t where a clean prediction becomes a velocity.
        image_px: side of the pictures it was trained on.
        patch: latent pixels a side in one token.
        pixels_per_token: picture pixels a side in one token.
        token_channels: numbers in one token.
        guidance_value: the constant that a transformer with a guidance input is fed; None: it has none.
        text_encoder_source: hub name and revision of the MLLM, if the folder only refers to it.
    """

    model_cpu_offload_seq = "text_encoder->query_adapter->transformer->vae"
    _optional_components = ["text_encoder"]

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        query_adapter: Any,
        prediction: str = "velocity",
        min_timestep: float = 0.05,
        image_px: int = 512,
        patch: int = 2,
        pixels_per_token: int = 16,
        token_channels: int = 64,
        guidance_value: float | None = None,
        text_encoder_source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if text_encoder is None and text_encoder_source is not None:
            text_encoder = _download(text_encoder_source, query_adapter.dtype)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            query_adapter=query_adapter,
        )
        self.register_to_config(
            prediction=prediction,
            min_timestep=min_timestep,
            image_px=image_px,
            patch=patch,
            pixels_per_token=pixels_per_token,
            token_channels=token_channels,
            guidance_value=guidance_value,
            text_encoder_source=text_encoder_source,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        seed: int = 0,
        image_px: int | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Paint one picture a prompt.

        Args:
            guidance_scale: 1 is none.
            seed: picture i starts from the noise of (seed, i).
            image_px: side of the square pictures; None: as in training.
            output_type: `pil`, `np`, `pt` (values in [0, 1]) or `latent` (normalised tokens (B, L, C)).
        Raises:
            ValueError: an empty or too long prompt, or a side that tokens do not tile.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings, device = self.config, self._execution_device
        px = image_px or settings["image_px"]
        if px % settings["pixels_per_token"]:
            raise ValueError(f"image_px {px} is not a multiple of {settings['pixels_per_token']}.")
        length, channels = (px // settings["pixels_per_token"]) ** 2, settings["token_channels"]
        x_BLC = philox_normal(seed, len(prompts), length * channels).view(-1, length, channels).to(device)
        conditions = [self.encode_prompt(p) for p in prompts]
        null = [self.encode_prompt(self.query_adapter.config["null_prompt"])] * len(prompts)
        self.scheduler.set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)])
        grid = self.scheduler.sigmas.tolist()
        bar: Any = self.progress_bar
        for step, t in enumerate(bar(self.scheduler.timesteps)):
            v = self.velocity(x_BLC, grid[step], conditions if guidance_scale != 0 else null)
            if guidance_scale not in (0.0, 1.0):
                v_null = self.velocity(x_BLC, grid[step], null)
                v = v_null + guidance_scale * (v - v_null)
            x_BLC = self.scheduler.step(v, t, x_BLC, return_dict=False)[0]
        images: Any = x_BLC if output_type == "latent" else self.decode(x_BLC, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def encode_prompt(self, prompt: str) -> Tensor:
        """Condition tokens (T, E) of one prompt."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        limit = self.query_adapter.config["max_caption_tokens"]
        if not 0 < len(ids) <= limit:
            raise ValueError(f"the prompt {prompt[:60]!r} has {len(ids)} tokens; 1 to {limit} are allowed.")
        lm = self.text_encoder.model.language_model
        embedded = lm.get_input_embeddings()(torch.tensor([ids], device=self._execution_device))
        return self.query_adapter(lm, embedded)[0]

    def velocity(self, x_BLC: Tensor, t: float, conditions: list[Tensor]) -> Tensor:
        """dx/dt at x; one batch if all conditions have one length, else one by one."""
        if len({len(c) for c in conditions}) > 1:
            parts = zip(x_BLC.split(1), conditions, strict=True)
            return torch.cat([self.velocity(x, t, [c]) for x, c in parts])
        time_B = torch.full((x_BLC.shape[0],), t, device=x_BLC.device)
        condition_BTE = torch.stack(conditions)
        guidance = self.config["guidance_value"]
        out_BLC = predict(self.transformer, x_BLC, time_B, condition_BTE, self.config["patch"], guidance)
        if self.config["prediction"] == "velocity":
            return out_BLC.to(x_BLC.dtype)
        return (x_BLC - out_BLC) / max(t, self.config["min_timestep"])

    def decode(self, x_BLC: Tensor, output_type: str = "pil") -> Any:
        """Pictures of normalised latent tokens."""
        return VaeImageProcessor().postprocess(
            decode_tokens(self.vae, x_BLC, self.config["patch"]).float(), output_type=output_type
        )


def _download(source: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        source["name"],
        revision=source["revision"],
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
    ).eval()
