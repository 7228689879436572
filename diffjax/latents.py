"""The frozen autoencoder of a latent stage: images to what is diffused, and back."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.interop.autoencoder import FAMILIES
from diffjax.interop.model import open_network
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.stage import Stage, to_model_range


@dataclasses.dataclass(frozen=True)
class Codec:
    """An autoencoder with its parameters, as two compiled functions.

    Attributes:
      encode: `(pixels, key) -> latents`, a draw; uint8 `[batch, h, w, 3]`, float32 `[batch, h / scale, …]`.
      decode: latents to images in [-1, 1].
    """

    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def open_codec(config: ConfigDict, stage: Stage, mesh: Mesh) -> Codec | None:
    """Read the autoencoder of a stage, as diffusers writes it; None if the stage works on pixels.

    Args:
      config: the stage's configuration.
      stage: the stage.
      mesh: over which the parameters are divided.

    Raises:
      UserError: it cannot be read, or its latents are not what the stage diffuses.
    """
    if not config.latent.channels:
        return None
    if not config.latent.folder:
        raise UserError(
            "latent.channels asks for latents, but latent.folder names no autoencoder; give the folder of "
            "one in diffusers' layout, such as the vae/ of Stable Diffusion."
        )
    network = open_network(Path(config.latent.folder).expanduser(), FAMILIES)
    net: Any = network.module
    if (net.latent_channels, net.stride()) != (stage.channels, stage.scale):
        raise UserError(
            f"latent.channels={stage.channels}, latent.scale={stage.scale}; but {config.latent.folder} makes "
            f"{net.latent_channels} channels and divides the resolution by {net.stride()}."
        )
    params = network.read(shardings=param_shardings(mesh, Rules(), network.shapes, network.axes))

    @jax.jit
    def encode(params: Any, pixels: jax.Array, key: jax.Array) -> jax.Array:
        posterior = net.apply({"params": params}, to_model_range(pixels), method="encode")
        return net.to_latents(posterior.sample(key))

    @jax.jit
    def decode(params: Any, latents: jax.Array) -> jax.Array:
        images = net.apply({"params": params}, net.from_latents(latents), method="decode")
        return jnp.clip(images, -1.0, 1.0)

    return Codec(functools.partial(encode, params), functools.partial(decode, params))
