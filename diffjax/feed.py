"""What the update is given at each step, and which examples that was."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffjax.data.prefetch import Prefetch
from diffjax.parallel.mesh import put_batch

# Updates that wait for the device, at most: enough to keep it busy, and their batches do not fill its memory.
AHEAD = 2

Batch = dict[str, jax.Array]


class Taken(NamedTuple):
    """A batch that was taken.

    Attributes:
      step: the number of its update, from 1.
      places: of the source's examples that this process read.
      before: the loader's position before it.
      after: the position after it.
    """

    step: int
    places: np.ndarray
    before: dict[str, Any]
    after: dict[str, Any]


class Feed:
    """Batches of a stage on its devices.

    Args:
      loader: the batches, at the position to start from; see `diffjax.data.loader`. It is closed here.
      mesh: where they go.
      finish: `(batch, step) -> batch`: what is done at the step itself, such as encoding captions; `step` is
        the state's, on the devices.
      remember: how many of the batches are remembered.
    """

    def __init__(
        self, loader: Any, mesh: Mesh, finish: Callable[[Batch, jax.Array], Batch], *, remember: int
    ) -> None:
        self._loader, self._mesh, self._finish = loader, mesh, finish
        self._taken: deque[Taken] = deque(maxlen=remember)
        self._start()

    def take(self, step: jax.Array, number: int) -> Batch:
        """The batch of update `number`, of a state with `step` (the same number less one, on the devices)."""
        before = self._batches.get_state()
        places, batch = next(self._batches)
        self._taken.append(Taken(number, places, before, self._batches.get_state()))
        return self._finish(batch, step)

    def taken(self, number: int) -> Taken:
        """What is remembered of the batch of update `number`; of the oldest, if that is forgotten."""
        return next(taken for taken in self._taken if taken.step >= number)

    def get_state(self) -> dict[str, Any]:
        """The loader's position after the last batch that was taken."""
        return self._batches.get_state()

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on from another position."""
        self._batches.close()
        self._loader.set_state(position)
        self._taken.clear()
        self._start()

    def waited(self) -> float:
        """Seconds without a batch since this was last called."""
        return self._batches.waited()

    def close(self) -> None:
        """End the threads."""
        self._batches.close()
        self._loader.close()

    def _start(self) -> None:
        self._batches = Prefetch(self._loader, self._place, ahead=AHEAD)

    def _place(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, Batch]:
        return batch["index"], put_batch({n: a for n, a in batch.items() if n != "index"}, self._mesh)
