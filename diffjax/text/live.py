"""Captions that are encoded when they are needed: no cache, but the encoder's work at every step.

The loader's threads make tokens of captions; the encoder's network runs on the devices, each on its part of
the batch, and what it gives does not leave them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.text.encoder import TextEncoder, TextStates

_PREFIX = "tokens/"
_KEEP = "keep_text"


@dataclasses.dataclass(frozen=True)
class AddTokens:
    """A transform that adds the tokens of a picture's caption; with chance `drop`, those of the empty one.

    It has the method of grain's `RandomMap`: which captions are dropped depends on the seed and the element's
    place in the order alone.

    Attributes:
      captions: of all pictures.
      encoder: the encoder.
      length: tokens per caption.
      drop: the chance.
      zeros: whether zeros stand for the states of what is dropped.
    """

    captions: Sequence[str]
    encoder: TextEncoder
    length: int
    drop: float = 0.0
    zeros: bool = False

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Add to an element, with its `index`, what `add_states` takes."""
        dropped = self.drop > 0.0 and rng.random() < self.drop
        caption = "" if dropped else self.captions[int(element["index"])]
        tokens = self.encoder.tokens([caption], length=self.length)
        added = {_PREFIX + name: array[0] for name, array in tokens.items()}
        return {**element, **added, _KEEP: np.bool_(not (dropped and self.zeros))}


def add_states(
    encoder: TextEncoder, batch: dict[str, jax.Array], sharding: jax.sharding.Sharding, *, length: int
) -> dict[str, jax.Array]:
    """A batch with `text`, `mask` and `pooled` in place of tokens, as the cache would have them.

    Args:
      encoder: the encoder.
      batch: on the devices.
      sharding: where the batch lies.
      length: tokens per caption.
    """
    tokens = {name.removeprefix(_PREFIX): array for name, array in batch.items() if name.startswith(_PREFIX)}
    rest = {name: array for name, array in batch.items() if not name.startswith(_PREFIX) and name != _KEEP}
    text = jax.device_put(_as_kept(encoder.states(tokens, length=length), batch[_KEEP]), sharding)
    return {**rest, "text": text.states, "mask": text.mask, "pooled": text.pooled}


@jax.jit
def _as_kept(text: TextStates, keep: jax.Array) -> TextStates:
    states = (text.states * keep[:, None, None]).astype(jnp.float16)
    return TextStates(states, text.mask, text.pooled * keep[:, None])
