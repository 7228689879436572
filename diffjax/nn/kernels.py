"""The kernels that compute attention, and which of them is used."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

_KERNEL: contextvars.ContextVar[str] = contextvars.ContextVar("attention_kernel", default="auto")


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """`softmax(scale query key^T + bias) value`, with the softmax in float32.

    Args:
      query: `[batch, length, heads, head_dim]`.
      key: `[batch, keys, heads, head_dim]`.
      value: `[batch, keys, heads, head_dim]`.
      mask: `[batch, keys]` bool, False where a key must not be seen; at least one True per row.
      bias: broadcastable to `[batch, heads, length, keys]`.
      causal: no query sees a key that comes later.
      scale: None: `head_dim ** -0.5`.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `value`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return KERNELS["xla"](query, key, value, mask, bias, causal, scale)


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Within it, attention that is traced uses the kernel of this name; see `KERNELS`."""
    if name not in KERNELS and name != "auto":
        raise ValueError(f"attention kernel {name!r}; expected auto, {', '.join(KERNELS)}")
    token = _KERNEL.set(name)
    try:
        yield
    finally:
        _KERNEL.reset(token)


def xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Two matrix products with a softmax between them: on every platform, differentiable in every mode."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    if causal:
        logits = jnp.where(jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool), logits, lowest)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, lowest)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


KERNELS: dict[str, Callable[..., jax.Array]] = {"xla": xla}
