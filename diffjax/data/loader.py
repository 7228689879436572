"""Batches from a source: shuffled, sharded over hosts, prefetched, and resumable to the very element."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffjax.data.source import Source
from diffjax.errors import UserError

if TYPE_CHECKING:
    import grain


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    transforms: Sequence[Callable[[dict[str, Any]], dict[str, Any]] | Any] = (),
    images: bool = True,
    num_threads: int = 4,
    prefetch: int = 2,
) -> "grain.DatasetIterator":
    """Make an iterator of batches.

    There is one global order of elements, which `seed` decides; each epoch is shuffled anew. Host `h` gets
    the elements `h, h + host_count, …` of it, so the global batches and their random transforms are the same
    for every number of hosts.

    Args:
      source: the pictures.
      batch_size: pictures per batch on this host; may exceed the size of the source.
      seed: decides the order and the random transforms; a whole number from 0 to 2^32 - 1.
      shuffle: whether to shuffle each epoch.
      num_epochs: how often to go through the source; None for ever. What does not fill a batch on every host
        is left out at the end of the last epoch.
      host_index: which host this is.
      host_count: how many hosts share the source.
      transforms: applied to each element, in order; functions from dict to dict, or objects with the method
        `random_map(element, rng)`, such as grain's `RandomMap` and `diffjax.data.transforms.RandomCrop`.
      images: whether elements begin with their picture; otherwise with `index` alone, and nothing is decoded.
      num_threads: threads that read and transform; 0 to do so in the calling thread.
      prefetch: batches to be read ahead.

    Returns:
      an iterator of dicts of numpy arrays: `image` `[batch, height, width, 3]` uint8 and `index` `[batch]`
      int32, the place in `source`. Its `get_state()` can be written as JSON; `set_state()` continues with
      exactly the batches that would have come next. `close()` ends its threads.

    Raises:
      UserError: if an argument is out of range, or no batch can be filled.
    """
    _check_arguments(len(source), batch_size, seed, num_epochs, host_index, host_count)
    # grain takes a second to import, which whoever only looks at a source need not wait for.
    import grain

    # Everything random comes before the slice: it depends on the global position, not on the host.
    elements = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        elements = elements.shuffle()
    elements = elements.repeat(num_epochs)
    elements = elements.map(
        lambda i: {**({"image": source[i].image} if images else {}), "index": np.int32(i)}
    )
    for transform in transforms:
        random_map = getattr(transform, "random_map", None)
        elements = elements.map(transform) if random_map is None else elements.random_map(random_map)

    # All hosts must see equally many batches, or the last step would wait for ever.
    global_batch = batch_size * host_count
    end = len(elements) // global_batch * global_batch
    elements = elements[host_index:end:host_count]
    buffered = max(num_threads, prefetch * batch_size)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffered if num_threads else 0)
    return iter(elements.to_iter_dataset(options).batch(batch_size, drop_remainder=True))


def _check_arguments(
    size: int, batch_size: int, seed: int, num_epochs: int | None, host_index: int, host_count: int
) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"The seed must be from 0 to 2^32 - 1, not {seed}.")
    if not 0 <= host_index < host_count:
        raise UserError(f"Host {host_index} is not one of {host_count} hosts, counted from 0.")
    if size == 0:
        raise UserError("The data set is empty: there is nothing to load.")
    if num_epochs is not None and num_epochs * size < batch_size * host_count:
        raise UserError(
            f"{num_epochs} epochs of {size} pictures do not fill one batch of {batch_size} on each of "
            f"{host_count} hosts."
        )
