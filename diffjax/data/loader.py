"""Batches from a source: shuffled, shared by processes, prefetched, and resumable to the very element."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffjax.data.checked import fingerprint
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.errors import UserError


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    rows: Sequence[int] | None = None,
    transforms: Sequence[Callable[[dict[str, Any]], dict[str, Any]] | Any] = (),
    images: bool = True,
    rejects: Rejects | None = None,
    num_threads: int = 4,
    prefetch: int = 2,
) -> "Batches":
    """Make an iterator of batches.

    There is one order of elements, which `seed` decides; each epoch is shuffled anew. Of several processes
    each gets some `rows` of every batch, so batches and their random transforms are the same for every number
    of processes. The place of a bad example is taken by another one, see `Rejects.usable`: so batches keep
    their size, and processes their number of batches, whoever meets it.

    Args:
      source: the pictures.
      batch_size: pictures per batch, of all processes together; may exceed the size of the source.
      seed: decides the order and the random transforms; a whole number from 0 to 2^32 - 1.
      shuffle: whether to shuffle each epoch.
      num_epochs: how often to go through the source; None for ever. What does not fill a batch is left
        out at the end of the last epoch.
      rows: which places of each batch this process reads; None: all.
      transforms: applied to each element, in order; functions from dict to dict, or objects with the method
        `random_map(element, rng)`, such as grain's `RandomMap` and `diffjax.data.transforms.RandomCrop`.
      images: whether elements begin with their picture; otherwise with `index` alone, and nothing is decoded.
      rejects: notes bad examples; None: a bad example is an error.
      num_threads: threads that read and transform; 0 to do so in the calling thread.
      prefetch: batches to be read ahead.

    Returns:
      an iterator of dicts of numpy arrays: `image` `[rows, height, width, 3]` uint8 and `index` `[rows]`
      int32, the place in `source`.

    Raises:
      UserError: if an argument is out of range, or no batch can be filled; from the iterator, if too many
        examples are bad.
    """
    rows = range(batch_size) if rows is None else rows
    _check_arguments(len(source), batch_size, seed, num_epochs, rows)
    # grain takes a second to import, which whoever only looks at a source need not wait for.
    import grain

    # Everything random comes before the rows are taken: it depends on the global position alone.
    elements = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        elements = elements.shuffle()
    elements = elements.repeat(num_epochs)
    elements = elements.map(lambda i: _element(source, i, images, rejects))
    for transform in transforms:
        random_map = getattr(transform, "random_map", None)
        elements = elements.map(transform) if random_map is None else elements.random_map(random_map)

    mine = grain.MapDataset.source(_Rows(elements, batch_size, rows))
    buffered = max(num_threads, prefetch * len(rows))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffered if num_threads else 0)
    batches = mine.to_iter_dataset(options).batch(len(rows), drop_remainder=True)
    data = {"examples": len(source), "digest": fingerprint(source)}
    return Batches(iter(batches), share=(len(rows), batch_size), data=data)


class Batches:
    """An iterator of batches whose position does not depend on how many processes share them."""

    def __init__(self, iterator: Any, *, share: tuple[int, int], data: dict[str, Any]) -> None:
        """`share`: how many elements of a batch `iterator` reads, of how many; `data`: which data."""
        self._iterator, self._share, self._data = iterator, share, data

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON can hold it.

        `next_index`: the number of the next element in the order of all processes; `source`: of how many
        `examples`, and their `digest`.
        """
        own, all_of_them = self._share
        next_index = self._iterator.get_state()["next_index"] // own * all_of_them
        return {"next_index": next_index, "source": dict(self._data)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batches that would have come next.

        Raises:
          UserError: the position is one in other data, whose order is another.
        """
        then, now = state.get("source", self._data), self._data
        if then != now:
            changed = "their names, captions or resolution are others"
            if then["examples"] != now["examples"]:
                changed = f"{then['examples']:,} examples could be used then, and {now['examples']:,} now"
            raise UserError(
                f"The data have changed since this run was saved: {changed}.\n"
                "Their order would not be the run's. Bring back the data as they were (--mode=data shows "
                "what cannot be used), or start a new run in another --workdir."
            )
        own, all_of_them = self._share
        self._iterator.set_state({"next_index": state["next_index"] // all_of_them * own})

    def close(self) -> None:
        """End the threads."""
        self._iterator.close()


def _element(source: Source, i: int, images: bool, rejects: Rejects | None) -> dict[str, Any]:
    """The beginning of an element; its index is that of the example it really holds."""
    if not images:
        return {"index": np.int32(i)}
    i, example = (i, source[i]) if rejects is None else rejects.usable(source, i)
    return {"image": example.image, "index": np.int32(i)}


class _Rows:
    """Some rows of each batch of `elements`, one after the other."""

    def __init__(self, elements: Any, batch_size: int, rows: Sequence[int]) -> None:
        self._elements, self._batch_size, self._rows = elements, batch_size, rows

    def __len__(self) -> int:
        # Whole batches only: all processes must see equally many, or the last step would wait for ever.
        return len(self._elements) // self._batch_size * len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        batch, place = divmod(i, len(self._rows))
        return self._elements[batch * self._batch_size + int(self._rows[place])]


def _check_arguments(
    size: int, batch_size: int, seed: int, num_epochs: int | None, rows: Sequence[int]
) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"The seed must be from 0 to 2^32 - 1, not {seed}.")
    if not len(rows) or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"rows {rows} of a batch of {batch_size}")
    if size == 0:
        raise UserError("The data set is empty: there is nothing to load.")
    if num_epochs is not None and num_epochs * size < batch_size:
        raise UserError(f"{num_epochs} epochs of {size} pictures do not fill one batch of {batch_size}.")
