"""What one image costs, item by item: FLOPs of matrix products, attention and convolutions, and bytes that
memory-bound operators move.

A multiply-add counts two. Backward passes count what the derivative needs: twice the forward pass where
weights and inputs get gradients, once where only the inputs do (the frozen LM's query rows). What attention
computes again in its backward pass is left to its efficiency. Recomputed activations are items of their own,
which do not count as useful work. B images of a micro-batch only matter for mask mode `drop`, whose packed
prefix has room for what almost every batch keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from iomm.config import GeneratorConfig
from iomm.model.blocks_z_image import mlp_width
from iomm.model.flops import generator_forward_flops
from iomm.model.padding import padded
from iomm.plan import elementwise
from iomm.plan.elementwise import Families, Passes
from iomm.plan.shapes import CodecShape, LmShape, VitShape
from iomm.plan.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of an image's bill."""

    name: str
    gemm: float = 0.0  # FLOPs of matrix products in the compute precision
    gemm_fp8: float = 0.0
    attention: float = 0.0  # forward
    attention_backward: float = 0.0
    convolution: float = 0.0  # in TF32: the autoencoder stays in fp32
    moved: float = 0.0  # bytes
    again: bool = False  # recomputed: no useful work
    where: str = (
        "generator"  # "encoders" (frozen), "conditioner" (trained, with the frozen LM) or "generator"
    )

    @property
    def flops(self) -> float:
        return self.gemm + self.gemm_fp8 + self.attention + self.attention_backward + self.convolution


def image_items(work: Workload, micro_batch: int) -> list[Item]:
    """Everything that training on one image costs."""
    return [*encoder_items(work), *condition_items(work, micro_batch), *generator_items(work, micro_batch)]


def encoder_items(work: Workload) -> list[Item]:
    """Autoencoder and ViT, if they are not cached."""
    items = []
    if "vae" not in work.cached:
        items.append(codec_item(work.codec, work.config.data.image_px))
    if "vit" not in work.cached:
        items.append(vit_item(work.mllm.vit, work.mllm.lm.width, work.element_bytes))
    return items


def codec_item(shape: CodecShape, image_px: int) -> Item:
    """The encoder of `AutoencoderKL` in fp32: per level resnets of two 3 x 3 convolutions, then half the
    side."""
    pixels, before, rows = image_px**2, shape.channels[0], 0.0
    flops = 2.0 * 9 * 3 * before * pixels
    for level, after in enumerate(shape.channels):
        for resnet in range(shape.resnets):
            source = before if resnet == 0 else after
            flops += 2.0 * pixels * (9 * source * after + 9 * after * after)
            flops += 2.0 * pixels * source * after if source != after else 0
        rows += shape.resnets * pixels * after
        if level < len(shape.channels) - 1:
            pixels //= 4
            flops += 2.0 * 9 * after * after * pixels
        before = after
    flops += 2 * 2.0 * pixels * 18 * before * before  # two resnets in the middle
    rows += 2 * pixels * before
    latent = 2 * shape.latent_channels
    flops += 2.0 * pixels * 9 * before * latent + (2.0 * pixels * latent * latent if shape.quant else 0)
    name = "autoencoder encode"
    moved = rows * elementwise.RESNET.eager_forward * 4
    if not shape.mid_attention:
        return Item(name=name, convolution=flops, moved=moved, where="encoders")
    attention = 4.0 * pixels**2 * before
    flops += 2.0 * 4 * pixels * before * before
    return Item(name=name, convolution=flops, attention=attention, moved=moved, where="encoders")


def vit_item(shape: VitShape, lm_width: int, element_bytes: int) -> Item:
    """InternVL's ViT over patches and class token, pixel shuffle, projector. Forward only."""
    d, s = shape.width, shape.patches + 1
    packed = d * shape.shuffle**2
    gemm = shape.layers * (2.0 * s * (4 * d * d + 2 * d * shape.mlp))
    gemm += 2.0 * shape.patches * 3 * shape.patch_px**2 * d
    gemm += 2.0 * shape.tokens * (packed * lm_width + lm_width * lm_width)
    moved = shape.layers * elementwise.VIT_LAYER.eager_forward * s * d * element_bytes
    attention = shape.layers * 4.0 * s * s * d
    return Item(name="ViT", gemm=gemm, attention=attention, moved=moved, where="encoders")


def lm_item(name: str, shape: LmShape, rows: float, keys: float, element_bytes: int) -> Item:
    """Rows of the LM forward, without its head, attending to `keys` positions each. The mask is an explicit
    one, so nothing of the square is skipped."""
    passes = elementwise.lm_layer(shape.mlp / shape.width, shape.kv_width / shape.width)
    return Item(
        name=name,
        gemm=shape.layers * 2.0 * rows * shape.layer_weights,
        attention=shape.layers * 4.0 * rows * keys * shape.width,
        moved=shape.layers * passes.eager_forward * rows * shape.width * element_bytes,
        where="conditioner",
    )


def input_gradient(name: str, item: Item, passes: Passes) -> Item:
    """The backward pass of frozen rows: as many matrix products as forward, for the inputs only."""
    return replace(
        item,
        name=name,
        attention=0.0,
        attention_backward=2 * item.attention,
        moved=item.moved * passes.eager_backward / passes.eager_forward,
    )


def condition_items(work: Workload, micro_batch: int) -> list[Item]:
    """Adapter, LM and connector, forward and backward."""
    lm, q, width = work.mllm.lm, work.queries, work.element_bytes
    p = work.prefix_tokens(micro_batch)
    passes = elementwise.lm_layer(lm.mlp / lm.width, lm.kv_width / lm.width)
    items = []
    if q == 0:
        items.append(lm_item("LM prefix", lm, p, p, width))
    elif work.config.condition.prefix_split:
        rows = lm_item("LM queries forward", lm, q, p + q, width)
        items += [lm_item("LM prefix", lm, p, p, width), rows]
        items.append(input_gradient("LM queries backward (inputs only)", rows, passes))
    else:
        rows = lm_item("LM prefix and queries forward", lm, p + q, p + q, width)
        items += [rows, input_gradient("LM prefix and queries backward (inputs only)", rows, passes)]
    if q:
        items = [*adapter_items(lm.width, p, q, width), *items]
    return [*items, *connector_items(work, work.condition_tokens(micro_batch))]


def adapter_items(d: int, p: float, q: float, element_bytes: int) -> list[Item]:
    """RQA forward and backward: its keys and values come from the prefix, which needs no gradient."""
    on_queries, on_prefix, attention = 2.0 * q * 10 * d * d, 2.0 * p * 2 * d * d, 4.0 * q * p * d
    of_q, of_p = elementwise.ADAPTER_QUERIES, elementwise.ADAPTER_PREFIX
    unit = d * element_bytes
    forward = Item(
        name="adapter forward",
        gemm=on_queries + on_prefix,
        attention=attention,
        moved=(q * of_q.eager_forward + p * of_p.eager_forward) * unit,
        where="conditioner",
    )
    backward = Item(
        name="adapter backward",
        gemm=2 * on_queries + on_prefix,
        attention_backward=2 * attention,
        moved=(q * of_q.eager_backward + p * of_p.eager_backward) * unit,
        where="conditioner",
    )
    return [forward, backward]


def connector_items(work: Workload, tokens: float) -> list[Item]:
    """Forward and backward, of the tokens that condition the generator."""
    config, d, out = (
        work.config.condition.connector,
        work.mllm.lm.width,
        work.config.generator.condition_width,
    )
    layers = config.layers if config.kind == "transformer" else 0
    hidden = 2.0 * tokens * d * d if config.kind == "mlp" else 0.0
    gemm = layers * 2.0 * tokens * 12 * d * d + hidden + 2.0 * tokens * d * out
    attention = layers * 4.0 * tokens * tokens * d
    passes, unit = elementwise.CONNECTOR_LAYER, layers * tokens * d * work.element_bytes
    return [
        Item(
            name="connector forward",
            gemm=gemm,
            attention=attention,
            moved=passes.eager_forward * unit,
            where="conditioner",
        ),
        Item(
            name="connector backward",
            gemm=2 * gemm,
            attention_backward=2 * attention,
            moved=passes.eager_backward * unit,
            where="conditioner",
        ),
    ]


def generator_items(work: Workload, micro_batch: int) -> list[Item]:
    """Forward, backward, and what is computed again."""
    config, tokens = work.config.generator, round(work.condition_tokens(micro_batch))
    total = generator_forward_flops(config, work.image_tokens, tokens)
    attention = attention_flops(config, work.image_tokens, tokens)
    in_fp8 = block_gemm_flops(config, work.image_tokens, tokens) if work.config.fp8.recipe != "none" else 0.0
    moved_forward = sum(generator_moved(work, tokens, lambda p: p.forward(work.fused)).values())
    moved_backward = sum(generator_moved(work, tokens, lambda p: p.backward(work.fused)).values())
    cast = quantised_bytes(work, tokens) if in_fp8 else 0.0
    forward = Item(
        name="generator forward",
        gemm=total - attention - in_fp8,
        gemm_fp8=in_fp8,
        attention=attention,
        moved=moved_forward + cast,
    )
    backward = Item(
        name="generator backward",
        gemm=2 * forward.gemm,
        gemm_fp8=2 * in_fp8,
        attention_backward=2 * attention,
        moved=moved_backward + cast,
    )
    items = [forward, backward]
    if work.config.parallel.recompute == "full":
        items.append(replace(forward, name="generator forward again (recompute)", again=True))
    elif work.config.parallel.recompute == "selective":
        again = Item(name="generator element-wise again (recompute)", moved=moved_forward, again=True)
        items.append(again)
    loss = 60.0 * work.image_tokens * config.token_channels * 4  # noise, path, loss in fp32: about 60 passes
    return [*items, Item(name="noise, path, loss", moved=loss)]


def attention_flops(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> float:
    """Of the generator forward, part of `generator_forward_flops`."""
    d, s = config.hidden_size, image_tokens + condition_tokens
    if config.family == "flux":
        blocks = config.double_blocks + config.single_blocks
        unread = 0 if config.single_blocks else 4.0 * condition_tokens * s * d
        return 4.0 * s * s * d * blocks - unread
    x, c = padded(image_tokens), padded(condition_tokens)
    return 4.0 * d * (config.refiner_blocks * (x * x + c * c) + config.single_blocks * (x + c) ** 2)


def block_gemm_flops(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> float:
    """Of the blocks' linears except modulation: what FP8 replaces."""
    d, s, r = config.hidden_size, image_tokens + condition_tokens, config.mlp_ratio
    if config.family == "flux":
        blocks = config.double_blocks + config.single_blocks
        unread = 0 if config.single_blocks else condition_tokens * 2.0 * (1 + 2 * r) * d * d
        return blocks * s * 2.0 * (4 + 2 * r) * d * d - unread
    x, c = padded(image_tokens), padded(condition_tokens)
    rows = config.refiner_blocks * (x + c) + config.single_blocks * (x + c)
    return rows * 2.0 * (4 * d * d + 3 * d * mlp_width(d))


def stacks(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> list[tuple[Families, float]]:
    """(families, rows times blocks) of each kind of block in the generator."""
    s = image_tokens + condition_tokens
    if config.family == "flux":
        return [
            (elementwise.double_block(config.mlp_ratio), s * config.double_blocks),
            (elementwise.single_block(config.mlp_ratio), s * config.single_blocks),
        ]
    x, c, share = padded(image_tokens), padded(condition_tokens), mlp_width(config.hidden_size)
    modulated = elementwise.z_image_block(share / config.hidden_size, modulated=True)
    plain = elementwise.z_image_block(share / config.hidden_size, modulated=False)
    return [
        (modulated, x * config.refiner_blocks + (x + c) * config.single_blocks),
        (plain, c * config.refiner_blocks),
    ]


def generator_moved(work: Workload, tokens: int, passes: Callable[[Passes], float]) -> dict[str, float]:
    """Bytes of the generator's memory-bound operators, by family."""
    config = work.config.generator
    unit = config.hidden_size * work.element_bytes
    moved: dict[str, float] = {}
    for families, rows in stacks(config, work.image_tokens, tokens):
        for name, family in families.items():
            moved[name] = moved.get(name, 0.0) + rows * passes(family) * unit
    return moved


def quantised_bytes(work: Workload, tokens: int) -> float:
    """What FP8 adds in one direction: each linear's input (or output gradient) is read once in the compute
    precision and written twice in 8 bits, once transposed."""
    config = work.config.generator
    inner = 2 * config.mlp_ratio / 2 + 3  # qkv, attention out, mlp: widths of their inputs in units of D
    rows = sum(rows for _, rows in stacks(config, work.image_tokens, tokens))
    return rows * inner * config.hidden_size * (work.element_bytes + 2)
