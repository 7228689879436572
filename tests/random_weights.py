"""Random weights that two programs make alike, from names and shapes: no file has to hold them."""

import zlib

import numpy as np


def random_weight(name, shape):
    """A float32 array; layers with such weights about keep the size of what they are given."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (len(shape) == 1 and not name.endswith(("bias", "running_mean"))):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.startswith("lin"):  # the heads of LPIPS are not negative
        return random.uniform(0, 1, shape).astype(np.float32)
    size = np.sqrt(2 / np.prod(shape[1:])) if name.endswith("weight") else 0.1
    return (random.normal(size=shape) * size).astype(np.float32)


def random_pictures(count, height, width):
    """uint8 `[count, height, width, 3]`: noise of all sizes, which resizing does not turn to grey."""
    random = np.random.default_rng(1)
    total = np.zeros((count, height, width, 3))
    for side in (1, 2, 4, 8, 16):
        rows, columns = -(-height // side), -(-width // side)
        noise = random.normal(size=(count, rows, columns, 3))
        total += noise.repeat(side, axis=1).repeat(side, axis=2)[:, :height, :width]
    return np.clip(128 + 30 * total, 0, 255).astype(np.uint8)
