"""What the rest of the library knows about a data set: captioned pictures with random access."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from diffjax.errors import UserError


class Example(NamedTuple):
    """One captioned picture.

    Attributes:
      image: `[resolution, resolution, 3]` uint8; possibly read-only, as a source may keep it in memory.
      caption: what the picture shows, in words.
      key: names this picture within its source, for ever.
      concept: what is shown, without the style ("red apple"); the name of the class or else the caption,
        where a source knows no more.
      style: how it is shown ("openmoji"); empty where a source does not say.
    """

    image: np.ndarray
    caption: str
    key: str
    concept: str
    style: str


class BadExample(UserError):
    """An example that a source lists cannot be used.

    Attributes:
      key: the example's.
      reason: why, in words that are the same for all examples of this kind.
    """

    def __init__(self, key: str, reason: str, detail: str = ""):
        super().__init__(f"Cannot use the example {key}: {detail or reason}.")
        self.key, self.reason = key, reason


class Source(Protocol):
    """A data set with random access; each source is one file behind this interface.

    The texts are available without decoding a picture, so captions can be embedded and splits counted
    before any image is touched.

    Attributes:
      name: names the source and its split, for logs and file names.
      resolution: height and width of every picture.
      captions: one text per picture, in the order of the pictures; so are `keys`, `concepts` and `styles`.
      labels: the class of each picture, an index into `classes`; empty if the source has no classes.
      classes: the names of the classes, the same in every split; empty if there are none.

    A source may also have `rejected`, pairs of key and reason of examples that were found bad when it was
    opened and are not among the others; `stamps`, the size and time of change of each example's file, by
    which a check of it is known to be out of date; and `size(i)`, the width and height of example `i` as its
    file says.
    """

    name: str
    resolution: int
    captions: Sequence[str]
    keys: Sequence[str]
    concepts: Sequence[str]
    styles: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...
