"""The kernels that compute attention, and which of them is used.

========  =================  ==================  ====================================  =================
kernel    runs on            dtypes              refuses                               differentiable
========  =================  ==================  ====================================  =================
`xla`     every platform     all                 nothing                               in every mode
`cudnn`   CUDA, from Ampere  bfloat16, float16   a bias; a mask if causal; head_dim    in reverse mode
                                                 over 128 or no multiple of 8
`flash`   TPU                bfloat16, float32   nothing                               in reverse mode
========  =================  ==================  ====================================  =================

`xla` holds the products of all queries and keys in memory while it runs and, unless they are many, until the
backward pass; the others never do. These are differentiable once, in reverse mode: an objective that needs
`jax.jvp` of a network (consistency training, mean flows) must trace it within `use_kernel("xla")`, else JAX
raises a TypeError about a custom_vjp function.

By default ("auto") it is the platform's own kernel if that can do what is asked and there is enough to do for
it, else `xla`. On a mesh (`jax.set_mesh`) every device runs the kernel on its own part of the batch, of the
heads and of the queries, as the rules of the logical axes have it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffjax.errors import UserError
from diffjax.nn.placement import mesh_axes

LONG = 1024**2  # products of a head's queries and keys from which on they are not to be kept in memory


class Choice(NamedTuple):
    """The name of a kernel or "auto", and the platform for which programs are lowered, "" for the usual."""

    kernel: str = "auto"
    platform: str = ""


_CHOICE = jax.make_user_context(Choice())  # part of the key of jit's caches, as a variable would not be


@contextlib.contextmanager
def use_kernel(name: str, *, platform: str = "") -> Iterator[None]:
    """Within it, attention that is traced uses the kernel of this name.

    Args:
      name: one of `KERNELS`, or "auto".
      platform: "cpu", "gpu" or "tpu", where programs are lowered for another platform than that of the mesh
        or, without one, JAX's default.

    Raises:
      UserError: there is no such kernel.
    """
    if name not in ("auto", *KERNELS):
        raise UserError(f"attention={name!r} does not exist; there are: auto, {', '.join(KERNELS)}.")
    with _CHOICE(Choice(name, platform)):
        yield


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

    Raises:
      UserError: the kernel that was chosen by its name cannot do this.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    name, platform = _CHOICE.value.kernel, target_platform()
    asked = (query, key, value, mask, bias, causal, scale)
    if name == "auto":
        name = next((other for other in KERNELS if KERNELS[other].suits(platform, *asked)), "xla")
    elif obstacle := KERNELS[name].obstacle(platform, *asked):
        raise UserError(
            f"attention={name!r}: this kernel {obstacle}; choose 'auto' or 'xla'.\nQuery: {query.dtype}"
            f"{list(query.shape)}, key: {key.dtype}{list(key.shape)}, mask: {mask is not None}, "
            f"bias: {bias is not None}, causal: {causal}, platform: {platform}"
        )
    return KERNELS[name].run(*asked)


def target_platform() -> str:
    """For which platform programs that are traced now will be compiled: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return _CHOICE.value.platform or getattr(device, "platform", None) or jax.default_backend()


def xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Two matrix products with a softmax between them; the compiler divides it over a mesh.

    Heads go before tokens first: with heads in the middle, XLA on CPUs computes the softmax anew for every
    feature of the output.
    """
    seen = None if mask is None else mask[:, None, None, :]
    if causal:
        earlier = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        seen = earlier if seen is None else seen & earlier

    def run(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None) -> jax.Array:
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        logits = scale * jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        if seen is not None:
            logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, value).swapaxes(1, 2)

    if (
        query.shape[1] * key.shape[1] >= LONG
    ):  # the backward pass computes the weights anew, as in flash attention
        run = jax.checkpoint(run)
    return run(query, key, value, bias)


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    causal: bool,
    scale: float,
) -> jax.Array:
    """The fused attention of cuDNN, `jax.nn.dot_product_attention`, on lengths filled up to multiples of 128.

    Of odd lengths it has no gradients; those of ragged ones have been NaN
    (https://github.com/NVIDIA/cudnn-frontend/issues/160).
    """
    del bias
    (batch, length), keys = query.shape[:2], key.shape[1]
    lengths = None
    if mask is not None:
        # It is told how many keys there are, not which; but their order means nothing: those seen go first.
        order = jnp.argsort(~mask, axis=1, stable=True)[:, :, None, None]
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        seen = (jnp.arange(keys) < lengths[:, None])[:, :, None, None]
        key, value = (jnp.where(seen, jnp.take_along_axis(x, order, axis=1), 0) for x in (key, value))
    elif keys % 128:
        lengths = jnp.full(batch, keys, jnp.int32)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, 0))) for x in (query, key, value)
    )
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )[:, :length]


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    causal: bool,
    scale: float,
) -> jax.Array:
    """JAX's own TPU kernel of FlashAttention (Dao et al., 2022), on lengths filled up to whole blocks."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    (batch, length, heads, head_dim), keys = query.shape, key.shape[1]
    block_q, block_k = flash_block(length), flash_block(keys)
    fill_q, fill_k = -length % block_q, -keys % block_k
    fill_dim = -head_dim % 128 if head_dim > 128 else 0

    def heads_first(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, fill_dim))).swapaxes(1, 2)

    segments = None  # queries see the keys that have their own number
    if mask is not None or fill_k:
        seen = jnp.ones((batch, keys), bool) if mask is None else mask
        seen = jnp.pad(seen, ((0, 0), (0, fill_k))).astype(jnp.int32)
        segments = tpu.SegmentIds(jnp.ones((batch, length + fill_q), jnp.int32), seen)
    if bias is not None:
        bias = jnp.broadcast_to(bias.astype(jnp.float32) / scale, (batch, heads, length, keys))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, fill_q), (0, fill_k)))  # the kernel scales the sum

    def blocks(names: str, size: int) -> dict[str, int]:
        return dict.fromkeys(names.split(), size)

    sizes = tpu.BlockSizes(
        block_b=1,
        **blocks("block_q block_q_major_dkv block_q_dkv block_q_dq", block_q),
        **blocks("block_k_major block_k block_k_major_dkv block_k_dkv block_k_major_dq block_k_dq", block_k),
    )
    y = tpu.flash_attention(
        heads_first(query, fill_q),
        heads_first(key, fill_k),
        heads_first(value, fill_k),
        bias,
        segments,
        causal=causal,
        sm_scale=scale,
        block_sizes=sizes,
    )
    return y.swapaxes(1, 2)[:, :length, :, :head_dim]


def flash_block(length: int) -> int:
    """The largest size of a block that adds at most an eighth to a length when that is filled up."""
    return next((size for size in (512, 256) if -length % size <= length // 8), 128)


def each_device(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel that the compiler cannot divide: on a mesh each device runs it on its own part."""

    def run(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        bias: jax.Array | None,
        causal: bool,
        scale: float,
    ) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {axis: mesh.shape[axis] for axis in mesh.auto_axes}
        if math.prod(sizes.values()) == 1:
            return kernel(query, key, value, mask, bias, causal, scale)

        def divided(axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
            axes = tuple(axis for axis in axes if axis in sizes)
            return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else None

        # A query needs all keys, and a causal one its own place among the others.
        names = ("batch", None if causal else "length", "heads")
        batch, length, heads = map(divided, mesh_axes(*names), query.shape)
        whole = PartitionSpec(batch, None, heads)
        bias_spec = None
        if bias is not None:
            bias = jnp.reshape(bias, (1,) * (4 - bias.ndim) + bias.shape)
            bias_axes = zip((batch, heads, length, None), bias.shape, strict=True)
            bias_spec = PartitionSpec(*(None if size == 1 else axes for axes, size in bias_axes))
        return jax.shard_map(
            lambda *arrays: kernel(*arrays, causal, scale),
            in_specs=(PartitionSpec(batch, length, heads), whole, whole, PartitionSpec(batch), bias_spec),
            out_specs=PartitionSpec(batch, length, heads),
            axis_names=set(sizes),
            check_vma=False,
        )(query, key, value, mask, bias)

    return run


class Kernel(NamedTuple):
    """A way to compute attention, and what it can do.

    Attributes:
      run: `(query, key, value, mask, bias, causal, scale) -> [batch, length, heads, head_dim]`.
      obstacle: `(platform, query, …, scale)` -> why it cannot do this, or "".
      least: products of queries and keys from which on "auto" prefers it to `xla`.
      divisible: whether the compiler can divide it over several devices though there is no mesh.
    """

    run: Callable[..., jax.Array]
    obstacle: Callable[..., str]
    least: float
    divisible: bool = True

    def suits(self, platform: str, query: jax.Array, key: jax.Array, *rest: Any) -> bool:
        """Whether "auto" uses it."""
        if query.shape[1] * key.shape[1] < self.least or self.obstacle(platform, query, key, *rest):
            return False
        return self.divisible or not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def cudnn_obstacle(
    platform: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    causal: bool,
    scale: float,
) -> str:
    """See `Kernel`."""
    if platform not in ("gpu", "cuda"):
        return f"runs on GPUs, not on {platform}"
    head_dim, here = query.shape[-1], jax.devices()[0]
    if here.platform == "gpu" and not _is_ampere(here):
        return f"needs an NVIDIA GPU of compute capability 8.0, not {here.device_kind}"
    if not (query.dtype == key.dtype == value.dtype and query.dtype in (jnp.bfloat16, jnp.float16)):
        return f"takes bfloat16 or float16, not {query.dtype}, {key.dtype} and {value.dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"takes heads of up to 128 features in multiples of 8, not {head_dim}"
    if bias is not None:
        return "takes no bias"
    return "takes no mask if it is causal" if causal and mask is not None else ""


def _is_ampere(device: jax.Device) -> bool:
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are names
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0


def flash_obstacle(platform: str, query: jax.Array, key: jax.Array, value: jax.Array, *rest: Any) -> str:
    """See `Kernel`."""
    if platform != "tpu":
        return f"runs on TPUs, not on {platform}"
    if not (query.dtype == key.dtype == value.dtype and query.dtype in (jnp.bfloat16, jnp.float32)):
        return f"takes bfloat16 or float32, not {query.dtype}, {key.dtype} and {value.dtype}"
    return ""


KERNELS: dict[str, Kernel] = {
    "xla": Kernel(xla, lambda *asked: "", math.inf),
    "cudnn": Kernel(each_device(cudnn), cudnn_obstacle, 128**2),
    "flash": Kernel(each_device(flash), flash_obstacle, LONG, divisible=False),
}
