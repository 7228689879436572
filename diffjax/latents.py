"""The frozen autoencoder of a latent stage: images to what is diffused, and back.

Images are encoded at every step of training, or once before it (`cache_latents`). Then means and standard
deviations are kept, so that each step still draws its latents anew.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.data.latent_cache import DTYPE, FORMAT_VERSION, LatentCache
from diffjax.data.progress import progress
from diffjax.data.source import Source
from diffjax.data.transforms import resize
from diffjax.errors import UserError
from diffjax.interop.autoencoder import FAMILIES
from diffjax.interop.model import Network, open_network
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.stage import Stage, to_model_range
from diffjax.untrusted import read_json

# Pictures that each device encodes at a time: at 512 px, one layer's activations are 1 GiB.
_PER_DEVICE = 8
# Pictures whose pixels are part of a cache's name: another folder may have files of the same names.
_LOOKED_AT = 64


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
    network = _open_autoencoder(config, stage)
    net: Any = network.module
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


@jax.jit
def draw(moments: jax.Array, key: jax.Array) -> jax.Array:
    """Latents `[batch, h, w, c]` of cached means and standard deviations, `[batch, 2, h, w, c]`."""
    mean, std = moments[:, 0].astype(jnp.float32), moments[:, 1].astype(jnp.float32)
    return mean + std * jax.random.normal(key, mean.shape)


def cache_latents(
    config: ConfigDict,
    stage: Stage,
    source: Source,
    *,
    log: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> LatentCache | None:
    """Encode all pictures of a source, those excepted that the cache on disk knows.

    The cache lies in `data.cache_dir/latents`, one folder for each source, resolution and autoencoder (their
    fingerprint); a picture that was replaced by another one under the same name may go unnoticed, so delete
    the folder then. Shards that are complete stay when this is interrupted, and damaged ones are made anew.

    Each process encodes every n-th shard on its own devices, then waits for the others; afterwards it reads
    the shards of all, so `data.cache_dir` must be a folder that all processes share.

    Args:
      config: the stage's configuration.
      stage: the stage.
      source: the pictures.
      log: receives lines about the encoding, as `print` would; None for silence.
      check: called for each batch; what it raises ends the encoding.

    Returns:
      The cache, open; None if the configuration asks for none.

    Raises:
      UserError: the autoencoder or a picture cannot be read, or the cache cannot be written or is not shared.
    """
    if not config.latent.cache:
        return None
    log = log or (lambda line: None)
    network = _open_autoencoder(config, stage)
    picture = _pictures(source, config.resolution)
    name = re.sub(r"[^\w.-]+", "-", source.name)[:64]
    folder = Path(config.data.cache_dir).expanduser() / "latents"
    folder /= f"{name}-{config.resolution}-{_fingerprint(config, network, source, picture)[:16]}"
    views = (2,) if config.data.flip else ()
    cache = LatentCache(folder, count=len(source), shape=(*views, 2, *stage.shape()))

    shards = range(jax.process_index(), cache.num_shards, jax.process_count())
    missing = [shard for shard in shards if not cache.open(shard)]
    for path in (cache.path(shard) for shard in missing if cache.path(shard).exists()):
        log(f"{path}: cannot be read (damaged?); its pictures are encoded anew.")
    if missing:
        total = sum(len(cache.places(shard)) for shard in missing)
        log(
            f"Encoding {total:,} pictures with {config.latent.folder}, once; they are kept in {folder} "
            f"({cache.num_bytes(total) / 1e6:,.0f} MB)."
        )
        encode, size = _batch_encoder(network, mirrored=bool(views))
        report = progress(log, total, "pictures encoded")
        with ThreadPoolExecutor(max(config.data.num_threads, 1)) as pool:
            for shard in missing:
                batches = _read_ahead(pool, picture, cache.places(shard), size)
                cache.write(shard, _encoded(encode, batches, check or (lambda: None), report))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("latents are cached")
    absent = [shard for shard in range(cache.num_shards) if not cache.open(shard)]
    if absent:
        raise UserError(
            f"{folder}: of {cache.num_shards} shards {len(absent)} cannot be read after encoding, such as "
            f"{cache.path(absent[0]).name}; all processes need the same folder: give a data.cache_dir that "
            "they share."
        )
    return cache


def _open_autoencoder(config: ConfigDict, stage: Stage) -> Network:
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
    return network


def _pictures(source: Source, resolution: int) -> Callable[[int], np.ndarray]:
    """A function from a picture's place to its pixels, as training sees them."""
    shrink = resize(source.resolution, resolution)
    return lambda i: shrink({"image": source[i].image})["image"]


def _fingerprint(
    config: ConfigDict, network: Network, source: Source, picture: Callable[[int], np.ndarray]
) -> str:
    """A digest of all that the latents of a source depend on; of its pixels, those of some pictures alone."""
    settings = read_json(network.folder / "config.json")
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    seen = [FORMAT_VERSION, source.name, config.resolution, bool(config.data.flip), settings]
    digest = hashlib.sha256(json.dumps([*seen, list(source.keys)], sort_keys=True).encode())
    count = min(len(source), _LOOKED_AT)
    for i in range(count):
        digest.update(picture(i * len(source) // count).tobytes())
    for path in network.store.files():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _batch_encoder(network: Network, *, mirrored: bool) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """A function from pixels to moments, float16, by this process's devices, and how many it takes."""
    net: Any = network.module
    mesh = make_mesh(devices=jax.local_devices())
    batch = _PER_DEVICE * mesh.size
    params = network.read(shardings=jax.tree.map(lambda _: replicated(mesh), network.shapes))

    @jax.jit
    def encode(params: Any, pixels: jax.Array) -> jax.Array:
        posterior = net.apply({"params": params}, to_model_range(pixels), method="encode")
        # Shifting and scaling is affine: a standard deviation is scaled by the derivative.
        std = jnp.exp(0.5 * posterior.logvar)
        return jnp.stack(jax.jvp(net.to_latents, (posterior.mean,), (std,)), axis=1).astype(DTYPE)

    def encode_views(pixels: np.ndarray) -> jax.Array:
        filled = np.concatenate([pixels, pixels[-1:].repeat(batch - len(pixels), axis=0)])
        views = [filled, filled[:, :, ::-1]] if mirrored else [filled]
        moments = [encode(params, jax.device_put(view, batch_sharding(mesh))) for view in views]
        return (jnp.stack(moments, axis=1) if mirrored else moments[0])[: len(pixels)]

    return encode_views, batch


def _read_ahead(
    pool: ThreadPoolExecutor, picture: Callable[[int], np.ndarray], places: Sequence[int], size: int
) -> Iterator[np.ndarray]:
    """Pixels in batches of `size`, of which one more is read while one is used."""
    ahead: collections.deque[list[Any]] = collections.deque()
    for start in range(0, len(places), size):
        ahead.append([pool.submit(picture, i) for i in places[start : start + size]])
        if len(ahead) > 1:
            yield np.stack([future.result() for future in ahead.popleft()])
    while ahead:
        yield np.stack([future.result() for future in ahead.popleft()])


def _encoded(
    encode: Callable[[np.ndarray], jax.Array],
    batches: Iterator[np.ndarray],
    check: Callable[[], None],
    report: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """The moments of each picture; the devices are at the next batch while one is written."""
    waiting: collections.deque[jax.Array] = collections.deque()

    def finished() -> np.ndarray:
        moments = np.asarray(waiting.popleft())
        if not np.isfinite(moments).all():
            raise UserError("The autoencoder's latents do not fit float16: latent.cache cannot keep them.")
        report(len(moments))
        return moments

    for pixels in batches:
        check()
        waiting.append(encode(pixels))
        if len(waiting) > 1:
            yield from finished()
    while waiting:
        yield from finished()
