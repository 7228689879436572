"""The types of blocks and the table of layers of diffusers' U-Nets."""

from collections.abc import Iterator, Sequence

from diffjax.errors import UserError
from diffjax.interop.families import choice
from diffjax.interop.rows import Row
from diffjax.models.unet2d import UNet2D

_BLOCKS = {  # attention, and what changes the resolution; None: what the configuration says for all of them
    "DownBlock2D": ("", "conv"),
    "ResnetDownsampleBlock2D": ("", "block"),
    "AttnDownBlock2D": ("self", None),
    "CrossAttnDownBlock2D": ("transformer", "conv"),
    "SimpleCrossAttnDownBlock2D": ("joint", "block"),
}
_DENSE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}
_POOLING = {"proj": "out", "pool.q_proj": "query", "pool.k_proj": "key", "pool.v_proj": "value"}


def kinds_of_types(types: Sequence[str], way: str, resample: str) -> list[tuple[str, str]]:
    """Attention and resampling of the levels whose blocks are of these types."""
    table = {name.replace("Down", way): kind for name, kind in _BLOCKS.items()}
    table |= {f"UNetRes{name}": kind for name, kind in table.items()}  # as they were called once
    found = [choice({"block type": name}, "block type", table, None) for name in types]
    return [(attention, how or resample) for attention, how in found]


def types_of_kinds(kinds: Sequence[str], resample: Sequence[str], way: str) -> tuple[list[str], str]:
    """The types of levels' blocks, and what resampling is called where they attend to themselves."""
    names = {kind: name.replace("Down", way) for name, kind in _BLOCKS.items()}
    keys = [(kind, None if kind == "self" else how) for kind, how in zip(kinds, resample, strict=True)]
    ways = {how for kind, how in zip(kinds, resample, strict=True) if kind == "self"}
    if not {*keys} <= {*names} or len(ways) > 1:
        raise UserError(f"diffusers has no blocks for attention {kinds} with resample {resample}.")
    return [names[key] for key in keys], "resnet" if "block" in ways else "conv"


def rows(network: UNet2D) -> list[Row]:
    """The table of a network."""
    found = [Row("conv_in", "in", "conv"), *_conditions(network)]
    for way in ("down", "up"):
        found += _levels(network, way)
    for j in range(network.middle_blocks):
        found += _block(network, f"mid_block.resnets.{j}", f"middle_{j}")
    names, kind = ("mid_block.attentions.0", "middle_attention"), network.middle_attention
    normed = kind != "self" or network.middle_groups != 0
    found += _attention(network, *names, kind, text_only=network.middle_text_only, normed=normed)
    return [*found, Row("conv_norm_out", "norm_out", "norm"), Row("conv_out", "out", "conv")]


def _conditions(network: UNet2D) -> Iterator[Row]:
    def mlp(theirs: str, ours: str) -> Iterator[Row]:
        yield from (Row(f"{theirs}.linear_{i}", f"{ours}/{name}") for i, name in ((1, "in"), (2, "out")))

    yield from mlp("time_embedding", "noise_level/mlp")
    if network.guidance_embed:
        yield Row("time_embedding.cond_proj", "guidance")
    if network.aug_level:
        yield from mlp("class_embedding", "aug_level/mlp")
    if network.classes:
        yield Row("class_embedding", "label/table", "embed")
    if network.pooled_embed:
        yield from mlp("add_embedding" if network.size_embed else "class_embedding", "pooled")
    if network.pooling_heads:
        theirs, ours = "add_embedding", "text_pooling"
        yield from (Row(f"{theirs}.{a}", f"{ours}/{b}") for a, b in _POOLING.items())
        yield from (Row(f"{theirs}.norm{i}", f"{ours}/norm_{a}", "norm") for i, a in ((1, "in"), (2, "out")))
        yield Row(f"{theirs}.pool.positional_embedding", f"{ours}/position", "raw")
    if network.context:
        yield Row("encoder_hid_proj", "text")


def _levels(network: UNet2D, way: str) -> Iterator[Row]:
    up, channels = way == "up", network.channels
    kinds = (network.up_attention if up else ()) or network.attention
    resample = (network.up_resample if up else ()) or network.resample
    for i, depths in enumerate(network.depths(up=up)):
        level = f"{way}_blocks.{len(channels) - 1 - i if up else i}"
        only = bool(network.text_only) and network.text_only[i]
        for j in range(len(depths)):
            skip = up or (j == 0 and channels[i] != channels[max(i - 1, 0)])
            yield from _block(network, f"{level}.resnets.{j}", f"{way}_{i}_{j}", skip=skip)
            names = f"{level}.attentions.{j}", f"{way}_{i}_{j}_attention"
            yield from _attention(network, *names, kinds[i], text_only=only)
        if i == (0 if up else len(channels) - 1):
            continue
        if resample[i] == "block":
            yield from _block(network, f"{level}.{way}samplers.0", f"{way}_{i}")
        else:
            yield Row(f"{level}.{way}samplers.0.conv", f"{way}_{i}/conv", "conv")


def _block(network: UNet2D, theirs: str, ours: str, *, skip: bool = False) -> Iterator[Row]:
    modulated = network.modulation == "scale_shift"
    yield Row(f"{theirs}.norm1", f"{ours}/norm_in", "norm")
    yield Row(f"{theirs}.norm2", f"{ours}/norm_out/norm" if modulated else f"{ours}/norm_out", "norm")
    yield Row(f"{theirs}.time_emb_proj", f"{ours}/norm_out/modulation" if modulated else f"{ours}/modulation")
    yield Row(f"{theirs}.conv1", f"{ours}/conv_in", "conv")
    yield Row(f"{theirs}.conv2", f"{ours}/conv_out", "conv")
    if skip:
        yield Row(f"{theirs}.conv_shortcut", f"{ours}/skip", "conv")


def _attention(
    network: UNet2D, theirs: str, ours: str, kind: str, *, text_only: bool, normed: bool = True
) -> Iterator[Row]:
    if kind == "transformer":
        yield from _transformer(theirs, ours, "dense" if network.linear_projection else "pointwise")
    if kind not in ("self", "joint"):
        return
    dense = dict(_DENSE)
    if normed:
        yield Row(f"{theirs}.group_norm", f"{ours}/norm", "norm")
    if kind == "joint":
        if network.text_groups:
            yield Row(f"{theirs}.norm_cross", f"{ours}/text_norm", "norm")
        if text_only:
            del dense["to_k"], dense["to_v"]
        dense |= {"add_k_proj": "text_key", "add_v_proj": "text_value"}
    yield from (Row(f"{theirs}.{a}", f"{ours}/{b}") for a, b in dense.items())


def _transformer(theirs: str, ours: str, projection: str) -> Iterator[Row]:
    yield Row(f"{theirs}.norm", f"{ours}/norm", "norm")
    yield from (Row(f"{theirs}.proj_{name}", f"{ours}/{name}", projection) for name in ("in", "out"))
    theirs, ours = f"{theirs}.transformer_blocks.{{i}}", f"{ours}/layers"
    for i, name in ((1, "attention"), (2, "cross_attention")):
        yield from (Row(f"{theirs}.attn{i}.{a}", f"{ours}/{name}/{b}") for a, b in _DENSE.items())
    for i, name in ((1, "attention"), (2, "cross"), (3, "mlp")):
        yield Row(f"{theirs}.norm{i}", f"{ours}/norm_{name}", "norm")
    for i, name in ((0, "in"), (1, "gate")):
        yield Row(f"{theirs}.ff.net.0.proj", f"{ours}/mlp/{name}", chunk=(i, 2))
    yield Row(f"{theirs}.ff.net.2", f"{ours}/mlp/out")
