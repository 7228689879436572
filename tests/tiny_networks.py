"""A tiny network of every family, and what it is told: the table of the tests that all networks must pass."""

import jax
import jax.numpy as jnp
from networks import Tiny

from diffjax.models.autoencoder import Autoencoder
from diffjax.models.dit import DiT
from diffjax.models.edm2 import EDM2UNet
from diffjax.models.flux import Flux
from diffjax.models.mmdit import MMDiT
from diffjax.models.unet import UNet
from diffjax.models.unet2d import UNet2D
from diffjax.nn.conditioning import NO_LABEL, Cond
from diffjax.nn.transformer import CONDITIONINGS

X, LOW_RES, TEXT, POOLED = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(3, 8, 4, 3), (3, 8, 4, 3), (3, 4, 6), (3, 5)])
)
LOGSNR, STEP = jnp.array([3.0, -1.0, 0.5]), jnp.array([250.0, 800.0, 40.0])
COND = Cond(
    text=TEXT,
    mask=jnp.array([[True] * 4, [True, True, False, False], [False] * 4]),
    pooled=POOLED,
    low_res=LOW_RES,
    aug_level=jnp.array([2.0, 0.0, -3.0]),
    label=jnp.array([2, 0, NO_LABEL]),
    size=jnp.array([[0.0, 0, 0, 0, *size] for size in ((512, 768), (64, 64), (90, 30))]),
    guidance=jnp.array([3.5, 1.0, 7.0]),
)
"""Three examples of all that a network may be told: a full text, a part of one and none."""


def told(level, *names, **others):
    """Images, their noise levels, and of the conditions those with these names, and `others`."""
    return X, level, Cond(**{name: getattr(COND, name) for name in names}, **others)


SUPER = ("text", "mask", "pooled", "low_res", "aug_level")
KEYS = ("attention/key/bias",)  # one constant added to all logits of a query changes no softmax

DIT = {"patch": 2, "embed": 24, "depth": 2, "heads": 2, "text": "", "classes": 3}
JIT = {
    "norm": "rms",
    "qk_norm": "rms",
    "activation": "silu",
    "gated": True,
    "positions": "sincos+rotary",
    "bottleneck": 6,
    "class_tokens": 3,
    "class_tokens_from": 1,
    "depth": 3,
}
DIT_OPTIONS = {
    **{name: {"conditioning": name} for name in CONDITIONINGS},
    "jit": JIT,
    "registers": {"registers": 3, "positions": "rotary", "qk_norm": "layer"},
    "apart": {"embed_per_block": True},
    "caption": {"text": "caption", "conditioning": "cross_attention", "sizes": True},
    "text": {"text": "pooled", "conditioning": "in_context", "classes": 0},
}


def dit(name, ways=()):
    """A DiT with these options, told what it asks for."""
    net = DiT(**DIT | DIT_OPTIONS[name])
    asked = {"label": net.classes, "size": net.sizes, "text": net.text, "mask": net.text}
    asked["pooled"] = net.text == "pooled"
    inputs = told(STEP, *(condition for condition, wanted in asked.items() if wanted))
    return Tiny(net, inputs, last="patch_out", unused=() if net.qk_norm else KEYS, ways=ways)


UNET = {
    "channels": 8,
    "multipliers": (1, 2),
    "self_attention": (False, True),
    "cross_attention": (False, True),
    "head_dim": 8,
}
UNET2D = {  # the least
    "channels": (4,),
    "blocks": (1,),
    "attention": ("transformer",),
    "up_attention": ("joint",),
    "heads": (2,),
    "depth": (2,),
    "resample": ("conv",),
    "middle_blocks": 0,
    "groups": 2,
    "text_embed": 6,
    "classes": 3,
    "in_channels": 6,
    "use_mask": True,
}
UNET2D_OPTIONS = UNET2D | {
    "channels": (4, 4),
    "blocks": (1, 1),
    "attention": ("", "joint"),
    "up_attention": (),
    "heads": (2, 2),
    "depth": (),
    "resample": ("block", "block"),
    "middle_blocks": 2,
    "middle_attention": "joint",
    "modulation": "scale_shift",
    "classes": 0,
    "aug_level": True,
    "use_mask": False,
    "pooled_embed": 17,
    "size_embed": 2,
    "guidance_embed": 4,
    "context": 4,
    "text_groups": 2,
    "pooling_heads": 2,
}
LAST_QUERY = ("context_query/kernel", "context_query/bias", "context_query_norm/scale")

NETWORKS = {
    "flux": Tiny(
        Flux(
            depth=2, single_depth=2, heads=2, head_dim=12, rope_dims=(2, 4, 6), in_channels=3, out_channels=3,
            text_embed=6, pooled_embed=5, guidance=True,
        ),
        told(STEP, "text", "pooled", "guidance"),
        last="out",
        gates=("single/modulation",),
    ),
    "mmdit": Tiny(
        MMDiT(
            depth=4, heads=2, head_dim=8, in_channels=3, out_channels=3, text_embed=6, pooled_embed=5,
            max_size=6, base_size=8, qk_norm="rms", dual_attention=(0, 1),
        ),
        told(STEP, "text", "pooled"),
        last="out",
        gates=("blocks_0/modulation",),
        # The table of positions is never learned, and no text is asked for after the last block.
        unused=("positions", *(f"blocks_3/attention/{name}" for name in LAST_QUERY)),
    ),
    "dit": Tiny(
        DiT(patch=2, embed=16, depth=2, heads=2), told(LOGSNR, *SUPER), last="patch_out", unused=KEYS
    ),
    **{f"dit {name}": dit(name) for name in DIT_OPTIONS},
    "dit adaln_zero": dit("adaln_zero", ("remat dots", "remat unrolled")),
    "dit jit": dit("jit", ("unrolled", "bfloat16")),
    "dit apart": dit("apart", ("unrolled", "bfloat16")),
    "unet": Tiny(UNet(**UNET, blocks=(1, 3)), told(LOGSNR, *SUPER), last="out", unused=KEYS),
    "unet efficient": Tiny(
        UNet(**UNET, blocks=(3, 1), efficient=True), told(LOGSNR, *SUPER), last="out", unused=KEYS
    ),
    "unet2d": Tiny(
        UNet2D(**UNET2D),
        # Every text has a word: what is said instead of no text is not for the network to know.
        told(STEP, "text", "low_res", "label", mask=COND.mask.at[2, 0].set(True)),
        last="out",
        unused=("layers/attention/key/bias", "cross_attention/key/bias"),
        ways=("remat", "remat unrolled", "bfloat16"),
    ),
    "unet2d options": Tiny(
        UNet2D(**UNET2D_OPTIONS),
        told(STEP, "text", "pooled", "low_res", "aug_level", "size", "guidance"),
        last="out",
        unused=("text_pooling/key/bias",),
        ways=(),
    ),
    "edm2": Tiny(
        EDM2UNet(
            channels=4, multipliers=(1, 2), blocks=3, attention=(False, True), head_dim=4, classes=5,
            out_channels=3,
        ),
        told(LOGSNR, "label"),
        last="gain",
    ),
    "autoencoder": Tiny(
        Autoencoder(latent_channels=2, channels=(4, 8), blocks=3, groups=2, sample_size=16, shift_factor=0.3),
        (X,),
        unused=KEYS,
    ),
}  # fmt: skip
