"""Guidance: functions that make one denoiser out of others."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.predictions import Estimate

Condition = TypeVar("Condition")


def classifier_free(
    denoiser_of: Callable[[Condition], Denoiser], cond: Condition, null_cond: Condition, guidance_scale: float
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans, 2022): `null + guidance_scale (cond - null)`.

    A scale of 1 means no guidance (and costs one pass of the network), 0 means unconditional. This is the
    convention of Imagen and of diffusers; the paper's w is `guidance_scale - 1`. Both passes run as one
    batch.

    Args:
      denoiser_of: binds a condition, a pytree of arrays `[batch, …]`, to the network.
      cond: the condition.
      null_cond: the null condition, of the same structure and shapes.
      guidance_scale: a Python number, so that a scale of 1 compiles to a single pass.
    """
    if guidance_scale == 1.0:
        return denoiser_of(cond)
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null_cond)
    denoise_both = denoiser_of(both)

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        doubled = denoise_both(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        # x0 and eps are linear in the network's output, so guiding them is guiding the output.
        return jax.tree.map(lambda e: _extrapolate(e, guidance_scale), doubled)

    return denoise


def _extrapolate(doubled: jax.Array, guidance_scale: float) -> jax.Array:
    with_cond, without = jnp.split(doubled, 2)
    return without + guidance_scale * (with_cond - without)
