"""The networks that are measured, and what the same ones are called by other libraries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models import dit_sizes, mmdit, unet
from diffjax.models.dit import DiT
from diffjax.models.mmdit import MMDiT
from diffjax.models.unet import UNet
from diffjax.models.unet2d import UNet2D
from diffjax.nn.conditioning import Cond


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the shapes of what it is given.

    Attributes:
      title: for the table.
      network: makes the module; called with `dtype` and whatever is to differ.
      side: of the images, or of the latents.
      channels: of these.
      batch: on a CPU.
      big_batch: on an accelerator.
      small: whether two CPU cores can do it within some seconds.
      classes: number of classes, 0 for none.
      text: length, width of the tokens and of the pooled vector; none if empty.
      low_res: whether it starts from a smaller image.
      peer: the same network elsewhere: `library`, `class` and the arguments `config`; None: there is none.
    """

    title: str
    network: Callable[..., Any]
    side: int
    channels: int
    batch: int = 8
    big_batch: int = 64
    small: bool = False
    classes: int = 0
    text: tuple[int, int, int] | tuple[()] = ()
    low_res: bool = False
    peer: dict[str, Any] | None = None

    def inputs(self, batch: int) -> tuple[jax.Array, jax.Array, Cond]:
        """Images, noise levels and conditions of a batch, as `jax.ShapeDtypeStruct`."""
        struct = jax.ShapeDtypeStruct
        image = struct((batch, self.side, self.side, self.channels), jnp.float32)
        level, cond = struct((batch,), jnp.float32), Cond()
        if self.classes:
            cond = cond._replace(label=struct((batch,), jnp.int32))
        if self.text:
            length, width, pooled = self.text
            cond = cond._replace(
                text=struct((batch, length, width), jnp.float32),
                mask=struct((batch, length), bool),
                pooled=struct((batch, pooled), jnp.float32),
            )
        if self.low_res:
            cond = cond._replace(low_res=image, aug_level=level)
        return image, level, cond


def _dit(name: str, *, peer: bool = False, **others: Any) -> Case:
    """Of latents of 256-pixel images; with one embedding in every block, as diffusers has it."""
    size = dit_sizes.SIZES[name]
    config = {
        "num_attention_heads": size["heads"],
        "attention_head_dim": size["embed"] // size["heads"],
        "num_layers": size["depth"],
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 32,
        "patch_size": size["patch"],
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }

    def network(**how: Any) -> DiT:
        return DiT(**{**size, "embed_per_block": peer, **how})

    same = {"library": "diffusers", "class": "DiTTransformer2DModel", "config": config} if peer else None
    return Case(name, network, 32, 4, classes=1000, peer=same, **others)


def _unet32() -> Case:
    channels, groups = (48, 96, 192), 16
    config = {
        "sample_size": 32,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 48,
        "norm_num_groups": groups,
    }

    def network(**how: Any) -> UNet2D:
        own = {
            "channels": channels,
            "blocks": (2, 2, 2),
            "attention": ("", "self", ""),
            "resample": ("conv",) * 3,
        }
        return UNet2D(heads=(1, 2, 4), groups=groups, **own, **how)

    same = {"library": "diffusers", "class": "UNet2DModel", "config": config}
    return Case("U-Net, 32 px", network, 32, 3, small=True, big_batch=512, peer=same)


def _mmdit() -> Case:
    """An MMDiT as wide and deep as half a DiT-S."""
    config = {
        "sample_size": 32,
        "num_layers": 6,
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "caption_projection_dim": 384,
        "joint_attention_dim": 768,
        "pooled_projection_dim": 512,
        "pos_embed_max_size": 32,
        "out_channels": 16,
    }

    def network(**how: Any) -> MMDiT:
        return MMDiT(
            **{"depth": 6, "heads": 6, "text_embed": 768, "pooled_embed": 512, "max_size": 32, **how}
        )

    same = {"library": "diffusers", "class": "SD3Transformer2DModel", "config": config}
    return Case("MMDiT, 6 blocks of 384", network, 32, 16, small=True, text=(77, 768, 512), peer=same)


def _imagen(low_res: bool) -> Case:
    """A small base network and a small Efficient U-Net; imagen-pytorch's nearest relatives."""
    own: dict[str, Any] = {"channels": 32, "multipliers": (1, 2, 4), "blocks": (2, 2, 2)}
    config: dict[str, Any] = {
        "dim": 32,
        "dim_mults": (1, 2, 4),
        "num_resnet_blocks": 2,
        "lowres_cond": low_res,
    }
    attends = (False, False, not low_res)
    own |= {"self_attention": attends, "cross_attention": (False, False, True), "efficient": low_res}
    config |= {"layer_attns": attends, "layer_cross_attns": (False, False, True)}
    config |= {"cond_dim": 128, "text_embed_dim": 768, "memory_efficient": low_res}
    same = {"library": "imagen_pytorch", "class": "Unet", "config": config}
    title, side = ("Efficient U-Net, 64 px, width 32", 64) if low_res else ("base U-Net, 32 px, width 32", 32)
    return Case(
        title,
        lambda **how: UNet(**{**own, **how}),
        side,
        3,
        small=True,
        text=(32, 768, 768),
        low_res=low_res,
        peer=same,
    )


def _published(size: str, title: str, side: int, *, low_res: bool = False) -> Case:
    return Case(
        title,
        lambda **how: UNet(**{**unet.SIZES[size], **how}),
        side,
        3,
        big_batch=32 if low_res else 64,
        text=(128, 4096, 4096),
        low_res=low_res,
    )


CASES: dict[str, Case] = {
    "unet32": _unet32(),
    "dit-s2": _dit("DiT-S/2", peer=True, small=True, big_batch=256),
    "dit-b2": _dit("DiT-B/2", peer=True, big_batch=256),
    "dit-xl2": _dit("DiT-XL/2", big_batch=128),
    "base32": _imagen(low_res=False),
    "sr64": _imagen(low_res=True),
    "base64": _published("base64-500m", "base U-Net 64 px, 500 M", 64),
    "sr256": _published("sr256-600m", "Efficient U-Net 256 px, 600 M", 256, low_res=True),
    "mmdit-small": _mmdit(),
    "mmdit": Case(
        "MMDiT, 2 B",
        lambda **how: MMDiT(**{**mmdit.SIZES["2b"], **how}),
        32,
        16,
        big_batch=16,
        text=(154, 4096, 2048),
    ),
}
"""By the names that `--case` takes."""
