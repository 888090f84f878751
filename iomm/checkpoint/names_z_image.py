"""Z-Image: `iomm.model.single_stream.SingleStreamDiT` and diffusers' `ZImageTransformer2DModel`, name by
name."""

from collections.abc import Mapping
from typing import Any

from iomm.checkpoint.name_table import (
    Constant,
    Interleave,
    Permute,
    Row,
    blocks,
    linear,
    stock_settings,
    vector,
)
from iomm.checkpoint.names_flux import OURS_KEY
from iomm.config import GeneratorConfig
from iomm.model.blocks_z_image import NORM_EPS, mlp_width, modulation_channels
from iomm.model.single_stream import TIME_HIDDEN, TimeEmbedding

THEIR_CLASS = "ZImageTransformer2DModel"
PATCH = 2
# What config.json may leave out: the arguments of their class.
DEFAULTS: dict[str, Any] = dict(
    all_patch_size=(PATCH,),
    all_f_patch_size=(1,),
    in_channels=16,
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    n_kv_heads=30,
    norm_eps=NORM_EPS,
    qk_norm=True,
    cap_feat_dim=2560,
    siglip_feat_dim=None,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=(32, 48, 48),
    axes_lens=(1024, 512, 512),
)
# Those that our model has no setting for. `axes_lens` is the size of their tables of angles; ours has none.
FIXED = ("all_patch_size", "all_f_patch_size", "norm_eps", "qk_norm", "siglip_feat_dim", "t_scale")
AXES_LENS = (1536, 512, 512)  # as published Z-Image folders have it: about 1,500 condition tokens, 512 rows
OURS_ONLY = ("predict", "norm_affine")


def rows(config: GeneratorConfig) -> tuple[Row, ...]:
    """The table of a SingleStreamDiT of this shape."""
    d, c, e = config.hidden_size, config.token_channels, config.condition_width
    m, order = modulation_channels(d), _token_order(c)
    x_in, final = f"all_x_embedder.{PATCH}-1", f"all_final_layer.{PATCH}-1"
    return (
        Row(("image_in.weight",), (f"{x_in}.weight",), ((d, c),), Permute(1, order)),
        vector("image_in.bias", f"{x_in}.bias", d),
        vector("condition_norm.weight", "cap_embedder.0.weight", e),
        *linear("condition_in", "cap_embedder.1", d, e),
        *linear("time.first", "t_embedder.mlp.0", TIME_HIDDEN, TimeEmbedding.FREQUENCIES),
        *linear("time.second", "t_embedder.mlp.2", m, TIME_HIDDEN),
        Row(("image_pad",), ("x_pad_token",), ((1, d),)),
        Row(("condition_pad",), ("cap_pad_token",), ((1, d),)),
        *blocks(config.refiner_blocks, _block("noise_refiner", "noise_refiner", config, modulated=True)),
        *blocks(config.refiner_blocks, _block("context_refiner", "context_refiner", config, modulated=False)),
        *blocks(config.single_blocks, _block("single_blocks", "layers", config, modulated=True)),
        *linear("out_modulation", f"{final}.adaLN_modulation.1", d, m),
        *linear("out", f"{final}.linear", c, d, Permute(0, order)),
    )


def _token_order(token_channels: int) -> tuple[int, ...]:
    """Where theirs has the numbers of our token. Ours runs (channel, row, column), theirs (row, column,
    channel)."""
    cells, channels = PATCH * PATCH, token_channels // (PATCH * PATCH)
    return tuple(cell * channels + channel for channel in range(channels) for cell in range(cells))


def _block(ours: str, theirs: str, config: GeneratorConfig, *, modulated: bool) -> tuple[Row, ...]:
    ours, theirs = ours + ".{i}", theirs + ".{i}"
    d, head_size, inner = (
        config.hidden_size,
        config.hidden_size // config.heads,
        mlp_width(config.hidden_size),
    )
    attention, mlp = f"{theirs}.attention", f"{theirs}.feed_forward"
    qkv = (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
    return (
        *linear(f"{ours}.qkv", qkv, 3 * d, d, Interleave(head_size), split=0, bias=False),
        vector(f"{ours}.norm.query.weight", f"{attention}.norm_q.weight", head_size),
        vector(f"{ours}.norm.key.weight", f"{attention}.norm_k.weight", head_size),
        *linear(f"{ours}.attention_out", f"{attention}.to_out.0", d, d, split=1, bias=False),
        *linear(f"{ours}.mlp.gate", f"{mlp}.w1", inner, d, split=0, bias=False),
        *linear(f"{ours}.mlp.up", f"{mlp}.w3", inner, d, split=0, bias=False),
        *linear(f"{ours}.mlp.down", f"{mlp}.w2", d, inner, split=1, bias=False),
        _norm(ours, "attention_norm_in", f"{theirs}.attention_norm1", config),
        _norm(ours, "attention_norm_out", f"{theirs}.attention_norm2", config),
        _norm(ours, "mlp_norm_in", f"{theirs}.ffn_norm1", config),
        _norm(ours, "mlp_norm_out", f"{theirs}.ffn_norm2", config),
        *(
            linear(f"{ours}.modulation", f"{theirs}.adaLN_modulation.0", 4 * d, modulation_channels(d))
            if modulated
            else ()
        ),
    )


def _norm(block: str, ours: str, theirs: str, config: GeneratorConfig) -> Row:
    d = config.hidden_size
    if config.norm_affine:
        return vector(f"{block}.{ours}.weight", f"{theirs}.weight", d)
    lender = (f"{block}.norm.query.weight",)
    return Row(lender, (f"{theirs}.weight",), ((d // config.heads,),), Constant((d,), 1.0))


def their_config(config: GeneratorConfig) -> dict[str, Any]:
    """config.json of the stock class."""
    return {
        "_class_name": THEIR_CLASS,
        OURS_KEY: {name: getattr(config, name) for name in OURS_ONLY},
        **{name: _json(DEFAULTS[name]) for name in FIXED},
        "in_channels": config.token_channels // PATCH**2,
        "dim": config.hidden_size,
        "n_layers": config.single_blocks,
        "n_refiner_layers": config.refiner_blocks,
        "n_heads": config.heads,
        "n_kv_heads": config.heads,
        "cap_feat_dim": config.condition_width,
        "rope_theta": config.rope_theta,
        "axes_dims": list(config.rope_axes),
        "axes_lens": list(AXES_LENS),
    }


def our_config(theirs: Mapping[str, Any]) -> GeneratorConfig:
    """The generator of a config.json of their class: ours (it says so under `_iomm`), or Z-Image's own.

    Raises:
        ValueError: settings that our model does not have.
    """
    stock = stock_settings(theirs, DEFAULTS, THEIR_CLASS)
    required = {**{name: DEFAULTS[name] for name in FIXED}, "n_kv_heads": stock["n_heads"]}
    for name, value in required.items():
        if _json(stock[name]) != _json(value):
            raise ValueError(
                f"config.json of the {THEIR_CLASS} has {name} {stock[name]}; our generator has it at {value} "
                "(Z-Image and Z-Image-Turbo; not the Omni variant). This model cannot be imported."
            )
    own = theirs.get(OURS_KEY, {})
    if unknown := sorted(own.keys() - set(OURS_ONLY)):
        raise ValueError(
            f"config.json has {', '.join(unknown)} under {OURS_KEY}; this iomm knows {', '.join(OURS_ONLY)}. "
            "Use the version that exported the folder."
        )
    return GeneratorConfig(
        family="z_image",
        hidden_size=stock["dim"],
        heads=stock["n_heads"],
        double_blocks=0,
        single_blocks=stock["n_layers"],
        refiner_blocks=stock["n_refiner_layers"],
        rope_axes=tuple(stock["axes_dims"]),
        rope_theta=stock["rope_theta"],
        token_channels=stock["in_channels"] * PATCH**2,
        condition_width=stock["cap_feat_dim"],
        **own,
    )


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
