"""EfficientNet-Lite0 (Tan and Le, 2019; "Lite": without squeeze-and-excitation, ReLU6 for swish)."""

from typing import NamedTuple

import flax.linen as nn
import jax

from diffjax.nn.frozen import BatchNorm, Depthwise

SIDE = 224
WIDTH = 1280
CLASSES = 1000


class _Stage(NamedTuple):
    """Blocks in a row.

    Attributes:
      blocks: how many.
      features: output channels.
      window: side of the depthwise kernels.
      stride: of the first block.
      expand: hidden channels, in input channels.
    """

    blocks: int
    features: int
    window: int
    stride: int
    expand: int = 6


_STAGES = (
    _Stage(1, 16, 3, 1, expand=1),
    _Stage(2, 24, 3, 2),
    _Stage(2, 40, 5, 2),
    _Stage(3, 80, 3, 2),
    _Stage(3, 112, 5, 1),
    _Stage(4, 192, 5, 2),
    _Stage(1, 320, 3, 1),
)


def _each(features: int, name: str) -> nn.Dense:
    """A convolution of 1x1: a linear layer at each place."""
    return nn.Dense(features, use_bias=False, name=name)


class _Block(nn.Module):
    """Widen, look around in each channel alone, narrow; what came in is added where it fits."""

    stage: _Stage
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c] -> [b, h/stride, w/stride, features]`."""
        stage, hidden, y = self.stage, x.shape[-1] * self.stage.expand, x
        if stage.expand > 1:
            y = jax.nn.relu6(BatchNorm(name="bn0")(_each(hidden, "expand_conv")(y)))
        y = Depthwise(stage.window, self.stride, name="depthwise_conv")(y)
        y = jax.nn.relu6(BatchNorm(name="bn1")(y))
        y = BatchNorm(name="bn2")(_each(stage.features, "project_conv")(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Pictures to the mean of the last feature maps, and to logits of ImageNet's 1000 classes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[n, 224, 224, 3]`, about from -1 to 1, to features `[n, 1280]` and logits `[n, 1000]`."""
        stem = nn.Conv(32, (3, 3), (2, 2), "SAME", use_bias=False, name="conv_stem")
        x = jax.nn.relu6(BatchNorm(name="bn0")(stem(x)))
        number = 0
        for stage in _STAGES:
            for index in range(stage.blocks):
                x = _Block(stage, 1 if index else stage.stride, name=f"blocks_{number}")(x)
                number += 1
        x = jax.nn.relu6(BatchNorm(name="bn1")(_each(WIDTH, "conv_head")(x))).mean(axis=(1, 2))
        return x, nn.Dense(CLASSES, name="fc")(x)
