"""Published sizes have the published numbers of parameters; they are built abstractly."""

import jax
import jax.numpy as jnp
import pytest

from diffjax.config import stage_config
from diffjax.experiment import build_stage
from diffjax.interop import sd3, unet2d
from diffjax.models import dit_sizes, edm2, flux, mmdit, unet, unet2d_sizes
from diffjax.models.autoencoder import Autoencoder
from diffjax.models.dit import DiT
from diffjax.models.edm2 import EDM2UNet
from diffjax.models.flux import Flux
from diffjax.models.mmdit import MMDiT
from diffjax.models.unet import UNet
from diffjax.models.unet2d import UNet2D
from diffjax.nn.conditioning import Cond
from diffjax.training.state import count_params


def of_dit(net):
    size = 2 * net.patch
    cond = Cond(label=jnp.zeros(1, int), text=jnp.zeros((1, 2, net.text_embed)))
    return jnp.zeros((1, size, size, net.in_channels)), jnp.zeros(1), cond


def of_unet(super_resolution):
    images, level = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1)
    low_res = {"low_res": images, "aug_level": level} if super_resolution else {}
    text = {
        "text": jnp.zeros((1, 128, 1024)),
        "mask": jnp.ones((1, 128), bool),
        "pooled": jnp.zeros((1, 1024)),
    }
    return images, level, Cond(**text, **low_res)


# By family: its sizes, a module of one of them, arguments of its `__call__`.
FAMILIES = {
    "flux": (flux.SIZES, Flux, sd3.example),
    "mmdit": (mmdit.SIZES, MMDiT, sd3.example),
    "dit": (dit_sizes.SIZES, DiT, of_dit),
    "unet base": (unet.SIZES, UNet, lambda net: of_unet(False)),
    "unet sr": (unet.SIZES, UNet, lambda net: of_unet(True)),
    "unet2d": (unet2d_sizes.SIZES, UNet2D, unet2d.FAMILIES["UNet2DModel"].example),
    "edm2": (
        edm2.SIZES, EDM2UNet,
        lambda net: (jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), Cond(label=jnp.zeros(1, int))),
    ),
    "autoencoder": (
        {"4": {}, "16": {"latent_channels": 16, "project_moments": False, "project_latents": False}},
        Autoencoder, lambda net: (jnp.zeros((1, 8, 8, 3)),),
    ),
}  # fmt: skip


def positions(name):
    """Elements of the table of positions, which is a buffer of diffusers' and a parameter here."""
    net = MMDiT(**mmdit.SIZES[name])
    return net.max_size**2 * net.heads * net.head_dim


# By family and size: the number of parameters, and by how much it is rounded. Papers and model cards give
# those of DiT, JiT, EDM2 and ADM in millions, those of Imagen and DeepFloyd more roughly still; the widths of
# IF-I-M, IF-I-L and IF-II-M are not published. The others are those of the published weights.
PUBLISHED = {
    "flux": {"flux1_dev": (11_901_408_320, 0), "flux1_schnell": (11_891_178_560, 0)},
    "mmdit": {
        "sd3_medium": (2_028_328_000 + positions("sd3_medium"), 0),
        "sd35_medium": (2_243_171_520 + positions("sd35_medium"), 0),
        "sd35_large": (8_056_627_520 + positions("sd35_large"), 0),
    },
    "dit": {
        "DiT-S/2": (33e6, 0.5e6),
        "DiT-B/2": (130e6, 0.5e6),
        "DiT-L/2": (458e6, 0.5e6),
        "DiT-XL/2": (675e6, 0.5e6),
        "JiT-B/16": (131e6, 0.5e6),
        "JiT-L/16": (459e6, 0.5e6),
        "JiT-H/16": (953e6, 0.5e6),
        "PixArt-alpha-XL/2-512": (611e6, 0.5e6),
    },
    "unet base": {"base64-2b": (2100e6, 105e6), "base64-500m": (524e6, 26e6)},
    "unet sr": {"sr256-400m": (429e6, 21e6), "sr256-600m": (600e6, 30e6), "sr1024-600m": (600e6, 30e6)},
    "unet2d": {
        "SD-1.5": (859_520_964, 0),
        "SD-2.1": (865_910_724, 0),
        "SDXL": (2_567_463_684, 0),
        "IF-I-M": (400e6, 30e6),
        "IF-I-L": (900e6, 50e6),
        "IF-I-XL": (4_300e6, 50e6),
        "IF-II-M": (450e6, 35e6),
        "IF-II-L": (1_200e6, 50e6),
        "ADM-64": (296e6, 0.5e6),
        "ADM-128": (422e6, 0.5e6),
        "ADM-256": (554e6, 0.5e6),
        "ADM-512": (559e6, 0.5e6),
        "DDPM-CIFAR10": (35_746_307, 0),
    },
    "edm2": {
        "xs": (125e6, 0.5e6),
        "s": (280e6, 0.5e6),
        "m": (498e6, 0.5e6),
        "l": (777e6, 0.5e6),
        "xl": (1119e6, 0.5e6),
        "xxl": (1523e6, 0.5e6),
    },
    "autoencoder": {"4": (83_653_863, 0), "16": (83_819_683, 0)},  # SD and SDXL; SD3 and FLUX
}
# What a stage's configuration says besides the size, and the widths of tokens and pooled text.
STAGES = {
    "SD-1.5": ({"resolution": 512, "latent.channels": 4}, 768, 0),
    "SDXL": ({"resolution": 1024, "latent.channels": 4, "conditions": ("text", "size")}, 2048, 1280),
    "IF-I-XL": ({"resolution": 64, "diffusion.vlb_weight": 1e-3}, 4096, 0),
    "IF-II-L": ({"resolution": 256, "low_res.resolution": 64, "diffusion.vlb_weight": 1e-3}, 4096, 0),
    "ADM-64": ({"resolution": 64, "conditions": ("label",), "diffusion.vlb_weight": 1e-3}, 0, 0),
}
ALONE = [(family, name) for family, sizes in PUBLISHED.items() for name in sizes if name not in STAGES]


@pytest.mark.parametrize(("family", "name"), ALONE)
def test_published_sizes(family, name):
    sizes, module, example = FAMILIES[family]
    net = module(**sizes[name], dtype=jnp.bfloat16)
    inputs = example(net)
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs)
    assert jax.tree.leaves(out)[0].shape[:3] == inputs[0].shape[:3]
    count, within = PUBLISHED[family][name]
    assert abs(count_params(variables["params"]) - count) <= within


@pytest.mark.parametrize("name", STAGES)
def test_published_sizes_as_configurations_of_a_stage(name):
    settings, text_embed, pooled_embed = STAGES[name]
    config = stage_config()
    config.model = {"name": "unet2d", "size": name}
    config.text.length = 77
    config.diffusion.inputs = {"name": "timestep"}
    config.diffusion.schedule = {"name": "ddpm"}
    config.update_from_flattened_dict(settings)
    config.data.resolution = config.resolution
    shapes = build_stage(config, text_embed=text_embed, pooled_embed=pooled_embed).shapes
    count, within = PUBLISHED["unet2d"][name]
    assert abs(count_params(shapes) - count) <= within


def test_there_are_all_the_published_sizes():
    names = {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    names |= {f"JiT-{size}/{patch}" for size in ("B", "L", "H") for patch in (16, 32)}
    assert dit_sizes.SIZES.keys() == names | {f"PixArt-alpha-XL/2-{pixels}" for pixels in (256, 512, 1024)}
    nets = [DiT(**attributes) for attributes in dit_sizes.SIZES.values()]
    assert all(net.embed % (4 * net.heads) == 0 for net in nets)
    others = {"unet": unet.SIZES, "unet2d": unet2d_sizes.SIZES, "edm2": edm2.SIZES}
    for family, sizes in (others | {"flux": flux.SIZES, "mmdit": mmdit.SIZES}).items():
        known = {name for of, names in PUBLISHED.items() if of.split()[0] == family for name in names}
        assert sizes.keys() - {"2b"} == known, family  # which is a recipe's
