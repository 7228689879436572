"""Slices of TPUs and machines of GPUs that are not there: programs can be compiled for them, but not run."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from diffjax.errors import UserError
from diffjax.parallel.chips import CHIPS


class Gpu(NamedTuple):
    """What XLA asks of a GPU beside `CHIPS`; from NVIDIA's whitepapers and CUDA's programming guide.

    Attributes:
      kind: JAX's `device_kind`.
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      clock: of these, in GHz.
      cache: of level 2, in bytes.
      shared: memory of a core that its threads can share, in bytes; a block has 1 KiB less.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    clock: float
    cache: int
    shared: int

    def description(self) -> str:
        """XLA's `GpuTargetConfigProto`, as text."""
        major, minor = self.capability
        chip = CHIPS[self.kind]
        values = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
            "threads_per_core_limit": 2048,
            "core_count": self.cores,
            "fpus_per_core": 128 if major > 8 else 64,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "memory_bandwidth": int(chip.bandwidth),
            "device_memory_size": chip.hbm,
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
        }
        lines = "\n".join(f"{name}: {value}" for name, value in values.items())
        return (
            f"gpu_device_info {{ {lines}\ncuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
            'platform_name: "CUDA"\n'
            "dnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 13 }\n"
            f'device_description_str: "{self.kind}"\n'
        )


GPUS: dict[str, Gpu] = {
    "a100": Gpu("NVIDIA A100", (8, 0), 108, 1.41, 40 * 2**20, 164 * 1024),
    "h100": Gpu("NVIDIA H100", (9, 0), 132, 1.98, 50 * 2**20, 228 * 1024),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 50 * 2**20, 228 * 1024),
}


def topology_devices(name: str) -> Sequence[Any]:
    """Devices that are not there.

    Call it before JAX has looked for devices: it makes JAX use the CPU for all else.

    Args:
      name: generation and shape of a TPU slice, such as "v5e:4x4" or "v5p:8x8x8" ("2xv5e:4x4" is two such
        slices), or one of `GPUS` and how many are connected, such as "h200" or "h100:8".

    Raises:
      UserError: their compiler is missing, or there are no such devices.
    """
    if gpus := re.fullmatch(rf"({'|'.join(GPUS)})(?::([1-9]\d*))?", name):
        return _gpus(name, GPUS[gpus[1]], int(gpus[2] or 1))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the compiler for TPUs: run `pip install 'diffjax[plan]'`.\n"
            f"For GPUs, give {', '.join(GPUS)} or, for several, {next(iter(GPUS))}:8.\n"
            "Without --topology, the plan is for the devices of this machine."
        )
    # Of libtpu: that there is no TPU to be asked, that others may use it too, and that it need not say so.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_ID": "0"}
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    several = re.fullmatch(r"([1-9]\d*)x([a-z].*)", name)
    settings: dict[str, Any] = {"num_slices": int(several[1])} if several else {}
    settings["topology_name"] = several[2] if several else name
    if settings["topology_name"].startswith("v4:"):  # its two cores are one device on real machines as well
        settings["chip_config_name"] = "megacore"
    return _described(
        name,
        "Expected a generation and a shape, such as v5e:4x4 or v5p:4x4x4 (2xv5e:4x4 is two slices), or "
        f"{', '.join(GPUS)}.",
        platform="tpu",
        **settings,
    )


def _gpus(name: str, gpu: Gpu, count: int) -> Sequence[Any]:
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, plugins)):
        raise UserError(
            f"--topology={name} needs the compiler for GPUs: run `pip install 'diffjax[plan_gpu]'`.\n"
            "Without --topology, the plan is for the devices of this machine."
        )
    advice = (
        "The compiler for GPUs must be of the same version as jax: run `pip install -U 'diffjax[plan_gpu]'`."
    )
    shape = f"1x1x{count}"  # slices, hosts of each, devices of each
    return _described(name, advice, platform="cuda", topology=shape, target_config=gpu.description())


def _described(name: str, advice: str, **settings: Any) -> Sequence[Any]:
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(**settings).devices
    except Exception as error:  # JaxRuntimeError or, from older plugins, others
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--topology={name}: {first}\n{advice}") from error
