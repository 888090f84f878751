"""FLUX: `iomm.model.mmdit.MMDiT` and diffusers' `FluxTransformer2DModel`, name by name."""

from collections.abc import Mapping
from typing import Any

from iomm.checkpoint.name_table import (
    Columns,
    Constant,
    Interleave,
    Row,
    blocks,
    linear,
    stock_settings,
    vector,
)
from iomm.config import GeneratorConfig

THEIR_CLASS = "FluxTransformer2DModel"
TIME_CHANNELS = 256  # of the sinusoids
MLP_RATIO, ROPE_THETA = 4.0, 10_000.0  # fixed in their class
# Their class always has a pooled text input. Of a model without one it is this wide, its weights are zero.
NO_POOLED_WIDTH = 1
# What config.json may leave out, as older FLUX folders do: the arguments of their class.
DEFAULTS: dict[str, Any] = dict(
    patch_size=1,
    in_channels=64,
    out_channels=None,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=False,
    axes_dims_rope=(16, 56, 56),
)
# Where config.json keeps settings that their class has no place for. diffusers passes over keys that start
# with "_" without a word.
OURS_KEY = "_iomm"
OURS_ONLY = ("predict", "pooled_width", "guidance_value")


def rows(config: GeneratorConfig) -> tuple[Row, ...]:
    """The table of an MMDiT of this shape."""
    d, mlp = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    time = "time_text_embed"
    return (
        *linear("image_in", "x_embedder", d, config.token_channels),
        *linear("condition_in", "context_embedder", d, config.condition_width),
        *linear("time.first", f"{time}.timestep_embedder.linear_1", d, TIME_CHANNELS),
        *linear("time.second", f"{time}.timestep_embedder.linear_2", d, d),
        *(_guidance(d) if config.guidance_embedding else ()),
        *(_no_pooled(d) if config.pooled_width is None else _pooled(d, config.pooled_width)),
        *blocks(config.double_blocks, _double(d, config.heads, mlp)),
        *blocks(config.single_blocks, _single(d, config.heads, mlp)),
        *linear("out_modulation.linear", "norm_out.linear", 2 * d, d),
        *linear("out", "proj_out", config.token_channels, d),
    )


def _guidance(d: int) -> tuple[Row, ...]:
    theirs = "time_text_embed.guidance_embedder"
    return (
        *linear("guidance.first", f"{theirs}.linear_1", d, TIME_CHANNELS),
        *linear("guidance.second", f"{theirs}.linear_2", d, d),
    )


def _pooled(d: int, width: int) -> tuple[Row, ...]:
    theirs = "time_text_embed.text_embedder"
    return (
        *linear("pooled.first", f"{theirs}.linear_1", d, width),
        *linear("pooled.second", f"{theirs}.linear_2", d, d),
    )


def _no_pooled(d: int) -> tuple[Row, ...]:
    theirs, lender, shape = "time_text_embed.text_embedder", ("time.first.bias",), ((d,),)
    return (
        Row(lender, (f"{theirs}.linear_1.weight",), shape, Constant((d, NO_POOLED_WIDTH))),
        Row(lender, (f"{theirs}.linear_1.bias",), shape, Constant((d,))),
        Row(lender, (f"{theirs}.linear_2.weight",), shape, Constant((d, d))),
        Row(lender, (f"{theirs}.linear_2.bias",), shape, Constant((d,))),
    )


def _double(d: int, heads: int, mlp: int) -> tuple[Row, ...]:
    ours, theirs, fuse = "double_blocks.{i}", "transformer_blocks.{i}", Interleave(d // heads)
    image, condition, attention = f"{ours}.image", f"{ours}.condition", f"{theirs}.attn"
    image_qkv = (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
    added_qkv = (f"{attention}.add_q_proj", f"{attention}.add_k_proj", f"{attention}.add_v_proj")
    return (
        *linear(f"{image}.modulation.linear", f"{theirs}.norm1.linear", 6 * d, d),
        *linear(f"{image}.qkv", image_qkv, 3 * d, d, fuse, split=0),
        vector(f"{image}.norm.query.weight", f"{attention}.norm_q.weight", d // heads),
        vector(f"{image}.norm.key.weight", f"{attention}.norm_k.weight", d // heads),
        *linear(f"{image}.attention_out", f"{attention}.to_out.0", d, d, split=1),
        *linear(f"{image}.mlp.first", f"{theirs}.ff.net.0.proj", mlp, d, split=0),
        *linear(f"{image}.mlp.second", f"{theirs}.ff.net.2", d, mlp, split=1),
        *linear(f"{condition}.modulation.linear", f"{theirs}.norm1_context.linear", 6 * d, d),
        *linear(f"{condition}.qkv", added_qkv, 3 * d, d, fuse, split=0),
        vector(f"{condition}.norm.query.weight", f"{attention}.norm_added_q.weight", d // heads),
        vector(f"{condition}.norm.key.weight", f"{attention}.norm_added_k.weight", d // heads),
        *linear(f"{condition}.attention_out", f"{attention}.to_add_out", d, d, split=1),
        *linear(f"{condition}.mlp.first", f"{theirs}.ff_context.net.0.proj", mlp, d, split=0),
        *linear(f"{condition}.mlp.second", f"{theirs}.ff_context.net.2", d, mlp, split=1),
    )


def _single(d: int, heads: int, mlp: int) -> tuple[Row, ...]:
    ours, theirs, fuse = "single_blocks.{i}", "single_transformer_blocks.{i}", Interleave(d // heads)
    qkv = (f"{theirs}.attn.to_q", f"{theirs}.attn.to_k", f"{theirs}.attn.to_v")
    attention_out, mlp_out = f"{ours}.attention_out.weight", f"{ours}.mlp_out.weight"
    return (
        *linear(f"{ours}.modulation.linear", f"{theirs}.norm.linear", 3 * d, d),
        *linear(f"{ours}.qkv", qkv, 3 * d, d, fuse, split=0),
        vector(f"{ours}.norm.query.weight", f"{theirs}.attn.norm_q.weight", d // heads),
        vector(f"{ours}.norm.key.weight", f"{theirs}.attn.norm_k.weight", d // heads),
        *linear(f"{ours}.mlp_in", f"{theirs}.proj_mlp", mlp, d, split=0),
        Row((attention_out, mlp_out), (f"{theirs}.proj_out.weight",), ((d, d), (d, mlp)), Columns(), split=1),
        vector(f"{ours}.mlp_out.bias", f"{theirs}.proj_out.bias", d),
    )


def their_config(config: GeneratorConfig) -> dict[str, Any]:
    """config.json of the stock class.

    Raises:
        ValueError: a setting that their class fixes at another value.
    """
    for name, value, fixed in (
        ("mlp_ratio", config.mlp_ratio, MLP_RATIO),
        ("rope_theta", config.rope_theta, ROPE_THETA),
    ):
        if value != fixed:
            raise ValueError(
                f"generator.{name} is {value}, {THEIR_CLASS} has {fixed} built in. This model cannot be "
                f"exported; train one with generator.{name}={fixed}."
            )
    return {
        "_class_name": THEIR_CLASS,
        OURS_KEY: {name: getattr(config, name) for name in OURS_ONLY},
        "patch_size": 1,
        "in_channels": config.token_channels,
        "out_channels": None,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.hidden_size // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.condition_width,
        "pooled_projection_dim": config.pooled_width or NO_POOLED_WIDTH,
        "guidance_embeds": config.guidance_embedding,
        "axes_dims_rope": list(config.rope_axes),
    }


def our_config(theirs: Mapping[str, Any]) -> GeneratorConfig:
    """The generator of a config.json of their class: ours (it says so under `_iomm`), or FLUX.1's own.

    Raises:
        ValueError: settings that our model does not have.
    """
    stock = stock_settings(theirs, DEFAULTS, THEIR_CLASS)
    if stock["patch_size"] != 1 or stock["out_channels"] not in (None, stock["in_channels"]):
        raise ValueError(
            f"config.json has patch_size {stock['patch_size']}, in_channels {stock['in_channels']} and "
            f"out_channels {stock['out_channels']}. Our generator gives tokens like those it takes: "
            "patch_size must be 1, and out_channels null or equal to in_channels (FLUX.1-dev, -schnell; "
            "not the Fill, Depth and Canny variants)."
        )
    own = {"pooled_width": stock["pooled_projection_dim"], **theirs.get(OURS_KEY, {})}
    if unknown := sorted(own.keys() - set(OURS_ONLY)):
        raise ValueError(
            f"config.json has {', '.join(unknown)} under {OURS_KEY}; this iomm knows {', '.join(OURS_ONLY)}. "
            "Use the version that exported the folder."
        )
    if own["pooled_width"] not in (None, stock["pooled_projection_dim"]):
        raise ValueError(
            f"config.json has pooled_projection_dim {stock['pooled_projection_dim']}, and under {OURS_KEY} "
            f"pooled_width {own['pooled_width']}. They must be equal, or pooled_width null."
        )
    return GeneratorConfig(
        hidden_size=stock["attention_head_dim"] * stock["num_attention_heads"],
        heads=stock["num_attention_heads"],
        double_blocks=stock["num_layers"],
        single_blocks=stock["num_single_layers"],
        mlp_ratio=MLP_RATIO,
        rope_axes=tuple(stock["axes_dims_rope"]),
        rope_theta=ROPE_THETA,
        token_channels=stock["in_channels"],
        condition_width=stock["joint_attention_dim"],
        guidance_embedding=stock["guidance_embeds"],
        **own,
    )
