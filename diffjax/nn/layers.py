"""Dense and convolution layers whose parameters carry logical axis names.

Every parameter says what its axes mean (`embed`, `mlp`, `heads`, …); `diffjax.parallel.rules` alone decides
where such an axis is placed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffjax.errors import UserError
from diffjax.nn.placement import constrain, num_parts, on_one_device

Initializer = Callable[..., jax.Array]
Dtype = Any

lecun = nn.initializers.lecun_normal()
zeros = nn.initializers.zeros_init()
ones = nn.initializers.ones_init()


class Dense(nn.Dense):
    """A linear layer whose output lies as its axis name says: the compiler does not have to guess.

    On one device it is a product of two matrices: of an input with more axes XLA on CPUs makes a transposed
    copy for the kernel's gradient, which takes a quarter of the time of the products.
    """

    axis: str = "features"

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[batch, ..., in] -> [batch, ..., features]`."""
        if on_one_device():
            outputs = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
            return outputs.reshape(*inputs.shape[:-1], self.features)
        return _placed(super().__call__(inputs), self.axis)

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias for inputs of a width, as they are when the layer is called."""
        kernel = self.param("kernel", self.kernel_init, (width, self.features), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, (self.features,), self.param_dtype)


def apply_together(layers: Sequence[Dense], inputs: jax.Array) -> list[jax.Array]:
    """What linear layers, alike but for their parameters, make of one input; inside a compact method.

    Where their features are divided over devices it is one product. Each product's gradient of the input is a
    sum over these devices, and XLA sends the sums one by one before it adds them up.

    Args:
      layers: new ones, which the method owns.
      inputs: `[batch, length, in]`.

    Returns:
      `[batch, length, features]` of each.
    """
    first = layers[0]
    if len(layers) == 1 or num_parts(first.axis) == 1:
        return [layer(inputs) for layer in layers]
    given = [layer.weights(inputs.shape[-1]) for layer in layers]
    cast = [nn.dtypes.promote_dtype(inputs, *weights, dtype=first.dtype) for weights in given]
    kernel = jnp.stack([kernel for _, kernel, _ in cast], axis=1)
    y = jnp.einsum("bli,inf->blnf", cast[0][0], kernel)
    if first.use_bias:
        y = y + jnp.stack([bias for _, _, bias in cast])
    y = constrain(y, "batch", "length", None, first.axis)
    # The gradient of a split is a concatenation; of indices it would be a sum of padded arrays.
    return [part[:, :, 0] for part in jax.lax.split(y, (1,) * len(layers), axis=2)]


def convolve(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, on those meshes where its result is right.

    Where rows are divided and the kernel is, too, XLA (of jax 0.10, on CPUs at least) computes wrong values;
    and wrong gradients, where rows and channels are.

    Raises:
      UserError: this mesh divides rows and channels.
    """
    if num_parts("height") > 1:
        if num_parts("conv_hidden") > 1:
            raise UserError(
                "This mesh divides both the rows and the channels of feature maps, which convolutions cannot "
                "do; set mesh.context=1 or mesh.tensor=1."
            )
        kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec())
    return jax.lax.conv_general_dilated(x, kernel, *args, **options)


class Conv(nn.Conv):
    """A convolution whose output lies as its axis name says."""

    axis: str = "conv_out"

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[batch, height, width, in] -> [batch, height, width, features]`."""
        return _placed(super().__call__(inputs), self.axis)


class Embed(nn.Embed):
    """A table of vectors, whole on every device when it is looked up.

    Left to itself the compiler looks up parts of the vectors of all examples, and sends them all to all.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`[...] int -> [..., features]`."""
        table = self.embedding if self.dtype is None else self.embedding.astype(self.dtype)
        return jnp.take(constrain(table, None, None), inputs, axis=0)


def _placed(y: jax.Array, axis: str) -> jax.Array:
    before = {2: ("batch",), 3: ("batch", "length"), 4: ("batch", "height", "width")}
    return constrain(y, *before[y.ndim], axis) if y.ndim in before else y


def dense(
    features: int,
    *,
    axes: tuple[str, str] = ("embed", "features"),
    use_bias: bool = True,
    kernel_init: Initializer = lecun,
    dtype: Dtype = None,
    name: str | None = None,
) -> Dense:
    """A linear layer `[..., in] -> [..., features]` whose kernel axes are named `axes`."""
    return Dense(
        features,
        axis=axes[1],
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(zeros, axes[1:]),
        name=name,
    )


def conv(
    features: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: Any = "SAME",
    use_bias: bool = True,
    axes: tuple[str, str] = ("conv_in", "conv_out"),
    kernel_init: Initializer = lecun,
    dtype: Dtype = None,
    name: str | None = None,
) -> Conv:
    """A square convolution `[b, h, w, in] -> [b, h/stride, w/stride, features]`.

    With a stride, `SAME` pads an even image on one side only; PyTorch's `padding=1` is `padding=1` here too.
    `axes` names the input and output channels.
    """
    return Conv(
        features,
        (kernel_size, kernel_size),
        axis=axes[1],
        conv_general_dilated=convolve,
        strides=(stride, stride),
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, ("window", "window", *axes)),
        bias_init=nn.with_logical_partitioning(zeros, axes[1:]),
        name=name,
    )


def layer_norm(
    *,
    epsilon: float = 1e-6,
    affine: bool = True,
    use_bias: bool = True,
    axis: str = "embed",
    dtype: Dtype = None,
    name: str | None = None,
) -> nn.LayerNorm:
    """A layer norm of the last axis; statistics in float32 whatever `dtype` is.

    Args:
      epsilon: added to the variance.
      affine: whether there are a scale and a bias.
      use_bias: whether there is a bias, given the scale.
      axis: logical name of the last axis.
      dtype: compute dtype.
      name: of the module.
    """
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_bias=affine and use_bias,
        use_scale=affine,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where the mean is large
        scale_init=nn.with_logical_partitioning(ones, (axis,)),
        bias_init=nn.with_logical_partitioning(zeros, (axis,)),
        name=name,
    )


def rms_norm(
    *,
    epsilon: float = 1e-6,
    affine: bool = True,
    axis: str = "embed",
    dtype: Dtype = None,
    name: str | None = None,
) -> nn.RMSNorm:
    """The last axis over its root mean square (Zhang and Sennrich, 2019); statistics in float32."""
    return nn.RMSNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_scale=affine,
        scale_init=nn.with_logical_partitioning(ones, (axis,)),
        name=name,
    )


class GroupNorm(nn.Module):
    """A group norm of `[batch, ..., channels]` with scale and bias (Wu and He, 2018); statistics in float32.

    Means are taken over places first and then over the channels of a group, and the variance is that of what
    is left without the mean: `E[x^2] - E[x]^2` would lose digits. On CPUs its gradient takes a quarter of the
    time of that of Flax's, which reshapes the feature map to groups.

    Attributes:
      groups: number of groups, which must divide the channels.
      epsilon: added to the variance.
      dtype: of the result.
    """

    groups: int
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Norm."""
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {channels} channels")
        scale, bias = (
            param(self, name, init, (channels,), ("conv_out",))
            for name, init in (("scale", ones), ("bias", zeros))
        )
        x = x.astype(jnp.float32)
        places = tuple(range(1, x.ndim - 1))

        def mean(values: jax.Array) -> jax.Array:
            each = values.mean(axis=places).reshape(x.shape[0], self.groups, -1).mean(axis=-1)
            return each.repeat(channels // self.groups, axis=-1).reshape(-1, *(1,) * len(places), channels)

        x = x - mean(x)
        return (x * (jax.lax.rsqrt(mean(x * x) + self.epsilon) * scale) + bias).astype(self.dtype)


def group_norm(
    groups: int, *, epsilon: float = 1e-6, dtype: Dtype = jnp.float32, name: str | None = None
) -> GroupNorm:
    """A group norm of `[batch, ..., channels]`; see `GroupNorm`."""
    return GroupNorm(groups, epsilon=epsilon, dtype=dtype, name=name)


def embedding(
    rows: int, features: int, *, init: Initializer | None = None, dtype: Dtype = None, name: str | None = None
) -> Embed:
    """A table of `rows` vectors, `[...] int -> [..., features]`."""
    init = nn.initializers.normal(0.02) if init is None else init
    return Embed(
        rows,
        features,
        dtype=dtype,
        embedding_init=nn.with_logical_partitioning(init, ("vocab", "embed")),
        name=name,
    )


def param(
    module: nn.Module, name: str, init: Initializer, shape: Sequence[int], axes: Sequence[str]
) -> jax.Array:
    """A bare parameter of `module`, float32, with logical axis names."""
    boxed_init = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed_init, tuple(shape), jnp.float32)  # type: ignore[return-value]
