"""Captioned emoji pictures: OpenMoji and Twemoji drawings, rendered at any resolution.

The pictures are rendered once and kept in a cache, which is then all that is needed. The packages that hold
drawings, names and the renderer are the extra `diffjax[emoji]`.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffjax.data.emoji_catalogue import (
    SPLITS,
    Picture,
    assign_splits,
    choose_concepts,
    import_extra,
    installed_versions,
    licence_notice,
    list_pictures,
)
from diffjax.data.picture_cache import Labels, PictureCache, encode_png, write_cache
from diffjax.data.source import Example
from diffjax.errors import UserError

Log = Callable[[str], None]

# Whether two pictures are the same is decided at one resolution, so that every resolution has the same set.
DUPLICATE_RESOLUTION = 64
# The splits of every resolution up to 128 stay in memory, decoded; larger ones are decoded when asked for.
MEMORY_LIMIT = 512 * 2**20
_RESOLUTIONS = range(8, 2049)


class EmojiSource:
    """A split of the emoji pictures, behind the interface `diffjax.data.source.Source`.

    The classes are the concepts of all splits in alphabetical order, so that a label means the same in each.
    """

    def __init__(self, cache: PictureCache, rows: Sequence[int], *, name: str):
        """Show the pictures `rows` of a cache, in that order."""
        labels = cache.labels
        self.name = name
        self.resolution = cache.resolution
        self.captions = [labels.captions[row] for row in rows]
        self.keys = [labels.keys[row] for row in rows]
        self.concepts = [labels.concepts[row] for row in rows]
        self.styles = [labels.styles[row] for row in rows]
        self.classes = sorted(set(labels.concepts))
        index = {concept: i for i, concept in enumerate(self.classes)}
        self.labels = [index[concept] for concept in self.concepts]
        self._cache = cache
        self._rows = list(rows)
        decoded_bytes = len(self._rows) * 3 * cache.resolution**2
        self._decoded: dict[int, np.ndarray] | None = {} if decoded_bytes < MEMORY_LIMIT else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        return Example(
            self._image(self._rows[i]), self.captions[i], self.keys[i], self.concepts[i], self.styles[i]
        )

    def _image(self, row: int) -> np.ndarray:
        if self._decoded is None:
            return self._cache.read(row)
        if row not in self._decoded:  # two threads may both read it: the second changes nothing
            self._decoded[row] = self._cache.read(row)
        return self._decoded[row]


def load_emoji(
    cache_dir: str | Path,
    *,
    resolution: int,
    split: str = "train",
    num_concepts: int | None = None,
    log: Log | None = None,
) -> EmojiSource:
    """Load a split of the emoji pictures, rendering them first if they are not in `cache_dir`.

    Args:
      cache_dir: a folder for caches; the pictures lie in `emoji-<resolution>` below it.
      resolution: height and width of the pictures.
      split: `train`; `heldout_concepts`, whose concepts are in training in no style; or `heldout_pairs`,
        whose concepts are in training in the other style.
      num_concepts: of the training split, only this many concepts, each in both styles.
      log: receives lines about the rendering, as `print` would; None for silence.

    Raises:
      UserError: if an argument is out of range, a package is missing, or the cache is damaged or cannot be
        written.
    """
    if split not in SPLITS:
        raise UserError(f"The emoji data set has no split {split!r}. Its splits are: {', '.join(SPLITS)}.")
    if num_concepts is not None and split != "train":
        raise UserError(f"num_concepts chooses from the split 'train'; it cannot be used with {split!r}.")
    if resolution not in _RESOLUTIONS:
        raise UserError(f"Emoji pictures have a resolution from 8 to 2048 pixels, not {resolution}.")
    folder = Path(cache_dir).expanduser() / f"emoji-{resolution}"
    if not folder.exists():
        render_cache(folder, resolution=resolution, log=log or (lambda line: None))
    cache = PictureCache(folder, resolution=resolution)

    labels = cache.labels
    splits = assign_splits(labels.concepts, labels.styles)
    rows = [row for row, found in enumerate(splits) if found == split]
    name = f"emoji-{split}"
    if num_concepts is not None:
        concepts = [labels.concepts[row] for row in rows]
        chosen = choose_concepts(concepts, [labels.styles[row] for row in rows], num_concepts)
        rows = [row for row in rows if labels.concepts[row] in chosen]
        name = f"{name}-{num_concepts}"
    return EmojiSource(cache, rows, name=name)


def render_cache(folder: Path, *, resolution: int, log: Log) -> None:
    """Render every emoji picture, drop duplicates, and write the cache `folder`."""
    packages = installed_versions()
    candidates = list_pictures()
    log(f"Rendering {len(candidates)} emoji pictures at {resolution} px into {folder}; this is done once.")
    pictures, pngs = _without_duplicates(candidates)
    log(f"{len(candidates) - len(pictures)} are duplicates; {len(pictures)} are left.")
    if resolution != DUPLICATE_RESOLUTION:
        pngs = _render_with_progress(pictures, resolution, log)
    labels = Labels(
        captions=[picture.caption for picture in pictures],
        keys=[picture.key for picture in pictures],
        concepts=[picture.concept for picture in pictures],
        styles=[picture.style for picture in pictures],
    )
    write_cache(
        folder, pngs, labels, resolution=resolution, packages=packages, licences=licence_notice(packages)
    )


def _without_duplicates(pictures: Sequence[Picture]) -> tuple[list[Picture], Iterator[bytes]]:
    """Keep the first of pictures that look the same; returns them and their PNGs at 64 pixels.

    Countries share flags and spellings share drawings; a copy in a held-out split would be no test at all.
    """
    seen: dict[bytes, tuple[Picture, bytes]] = {}
    for picture in pictures:
        image = render(picture.svg, DUPLICATE_RESOLUTION)
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in seen:
            seen[digest] = picture, encode_png(image)
    return [picture for picture, _ in seen.values()], (png for _, png in seen.values())


def _render_with_progress(pictures: Sequence[Picture], resolution: int, log: Log) -> Iterator[bytes]:
    for done, picture in enumerate(pictures):
        if done and done % 1000 == 0:
            log(f"Rendered {done} of {len(pictures)} emoji pictures.")
        yield encode_png(render(picture.svg, resolution))


def render(svg: Path, resolution: int) -> np.ndarray:
    """Render an SVG file on white: `[resolution, resolution, 3]` uint8."""
    resvg = import_extra("resvg_py")
    # The drawings hold no text; looking for the system's fonts would only cost time.
    png = resvg.svg_to_bytes(
        svg_path=str(svg), width=resolution, height=resolution, background="#ffffff", skip_system_fonts=True
    )
    canvas = Image.new("RGB", (resolution, resolution), "white")
    with Image.open(io.BytesIO(png), formats=["PNG"]) as drawing:
        # A few drawings are not square: resvg fits them into the square, and leaves the centring to us.
        canvas.paste(drawing, ((resolution - drawing.width) // 2, (resolution - drawing.height) // 2))
    return np.asarray(canvas)
