"""Networks that turn pictures into features: what distances, precision and recall compare.

Which networks there are, and where their weights come from: `diffjax.interop.features`.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Features(NamedTuple):
    """What a network sees in `n` pictures.

    Attributes:
      features: `[n, width]`, float32.
      logits: `[n, classes]`, float32; None where the network does not classify.
    """

    features: np.ndarray
    logits: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network behind its own preprocessing.

    Attributes:
      name: as tables print it, such as "EfficientNet-Lite0".
      distance: what the Fréchet distance of these features is called, such as "FD-EfficientNet-Lite0".
      width: of the features.
      classes: of the logits; 0: there are none.
      prepare: pictures to what the network takes, on the host: uint8 `[n, h, w, 3] -> [n, side, side, 3]`.
      apply: the network, `(params, prepared) -> (features, logits or None)`.
      params: its parameters.
      batch_size: pictures of one call, on all devices together; fewer are filled up.
      mesh: None, or a mesh: its devices of this process share a batch. Every process calls it for pictures
        of its own, as many as it likes.
    """

    name: str
    distance: str
    width: int
    classes: int
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]]
    params: Any
    batch_size: int = 16
    mesh: Mesh | None = None

    def __call__(self, images: np.ndarray) -> Features:
        """Features of pictures.

        Args:
          images: uint8 `[n, h, w, 3]`, of any one size.

        Raises:
          ValueError: they are something else.
        """
        _check(images)
        columns = self._batches.columns(images, self.prepare)
        return Features(columns[0], columns[1] if self.classes else None)

    @cached_property
    def _batches(self) -> "_Batches":
        widths = (self.width, self.classes) if self.classes else (self.width,)
        return _Batches(self.apply, self.params, widths, self.batch_size, self.mesh)


@dataclasses.dataclass(frozen=True)
class PairDistance:
    """A learned distance of two pictures.

    Attributes:
      name: as tables print it, such as "LPIPS (alex)".
      apply: the network, `(params, pairs [n, h, w, 6]) -> [n]`.
      params: its parameters.
      batch_size: pairs of one call.
      mesh: see `Extractor`.
    """

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batch_size: int = 16
    mesh: Mesh | None = None

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distances of the pictures of `a` to those of `b`, uint8 `[n, h, w, 3]`: `[n]`, float32.

        Raises:
          ValueError: they are something else, or not as many.
        """
        _check(a)
        _check(b)
        if a.shape != b.shape:
            raise ValueError(f"pictures are {a.shape} and {b.shape}, expected the same shape")
        return self._batches.columns(np.concatenate([a, b], axis=-1))[0][:, 0]

    @cached_property
    def _batches(self) -> "_Batches":
        def apply(params: Any, pairs: jax.Array) -> tuple[jax.Array]:
            return (self.apply(params, pairs)[:, None],)

        return _Batches(apply, self.params, (1,), self.batch_size, self.mesh)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A network that is applied to batches of one size, compiled once for each size of pictures."""

    apply: Callable[[Any, jax.Array], tuple[jax.Array | None, ...]]
    params: Any
    widths: tuple[int, ...]
    batch_size: int
    mesh: Mesh | None

    def columns(
        self, images: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images
    ) -> list[np.ndarray]:
        """What the network gives for `images`: for each of `widths` float32 `[n, width]`."""
        params, place = self._placed
        parts = len(self.mesh.local_devices) if self.mesh else 1
        size = -(-self.batch_size // parts) * parts
        found = [np.empty((len(images), width), np.float32) for width in self.widths]
        for start in range(0, len(images), size):
            batch = prepare(images[start : start + size])
            filled = np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
            # GPUs and TPUs would otherwise multiply with fewer bits, and statistics travel between machines.
            with jax.default_matmul_precision("highest"):
                outputs = self._compiled(params, jax.device_put(filled, place))
            for column, output in zip(found, outputs, strict=False):
                column[start : start + size] = np.asarray(output)[: len(batch)]
        return found

    @cached_property
    def _compiled(self) -> Callable[[Any, Any], Any]:
        return jax.jit(self.apply)

    @cached_property
    def _placed(self) -> tuple[Any, Any]:
        """The parameters on every device of this process, and where a batch goes."""
        if self.mesh is None:
            return self.params, jax.local_devices()[0]
        local = Mesh(np.array(self.mesh.local_devices), ("data",))
        whole, divided = (NamedSharding(local, PartitionSpec(*axes)) for axes in ((), ("data",)))
        return jax.device_put(jax.device_get(self.params), whole), divided


def _check(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 [n, h, w, 3]")
