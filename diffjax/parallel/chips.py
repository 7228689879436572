"""What chips can do by their makers' tables.

Sources, per chip: peak rate of dense bfloat16 matrix products, memory, its bandwidth, and the bandwidth of
all links to other chips in one direction (half of what is sold as bidirectional).

============  =====================================================================================
TPU           cloud.google.com/tpu/docs: pages v4, v5e, v5p, v6e, tpu7x; the links of v4 from Jouppi et
              al., 2023 (arXiv 2304.01433, table 4: six of 50 GB/s)
A100          NVIDIA A100 80GB datasheet (SXM: 312 TFLOP/s, 2039 GB/s, NVLink 600 GB/s)
H100, H200    NVIDIA H100 and H200 datasheets (SXM: 989 TFLOP/s without sparsity; 3.35 and 4.8 TB/s; NVLink
              900 GB/s)
============  =====================================================================================

GPUs of several machines have less between them than these links; the data centre's network of TPU slices is
not in the table either.
"""

import os
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """What one device of JAX can do; 0 is unknown.

    Attributes:
      name: short.
      flops: bfloat16 matrix products, in FLOP/s.
      hbm: bytes of memory.
      bandwidth: of that memory, in bytes/s.
      links: to other devices, all together, one direction, in bytes/s.
    """

    name: str
    flops: float = 0.0
    hbm: int = 0
    bandwidth: float = 0.0
    links: float = 0.0


# By the beginning of JAX's `device_kind`; the first that fits. A TPU7x is two devices: these are halves.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 300e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * GIB, 1600e9, 400e9),
    "TPU7x": Chip("half a TPU7x", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2),
    "NVIDIA A100": Chip("A100 80GB", 312e12, 80 * 10**9, 2039e9, 300e9),
    "NVIDIA H100": Chip("H100 SXM", 989e12, 80 * 10**9, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200 SXM", 989e12, 141 * 10**9, 4800e9, 450e9),
}


def chip_of(device: Any) -> Chip:
    """What is known of a device; of a CPU, its share of the machine's memory alone."""
    kind = device.device_kind
    for prefix, chip in CHIPS.items():
        if kind.startswith(prefix):
            return chip
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Chip("CPU", hbm=memory // jax.local_device_count("cpu"))
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Chip(kind, hbm=limit)
