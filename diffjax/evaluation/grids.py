"""Pictures for people: grids, sheets with captions, and PNG files that say how they were made."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from diffjax.errors import UserError

_GAP = 4
_LABEL_HEIGHT = 18


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Repeat pixels until the side is at least `size`: `[r, r, 3] -> [r*k, r*k, 3]`, uint8."""
    factor = max(1, -(-size // image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Images in rows on white: uint8 `[height, width, 3]`. All images must be of one size."""
    side = rows[0][0].shape[0]
    columns = max(len(row) for row in rows)
    cell = side + _GAP
    canvas = np.full((len(rows) * cell + _GAP, columns * cell + _GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = _GAP + i * cell, _GAP + j * cell
            canvas[top : top + side, left : left + side] = image
    return canvas


def square_grid(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Images in reading order, `columns` to a row (about as many rows as columns if None)."""
    columns = columns or max(1, round(len(images) ** 0.5))
    return grid([images[i : i + columns] for i in range(0, len(images), columns)])


def contact_sheet(
    pictures: Sequence[tuple[np.ndarray, str]], *, side: int = 128, columns: int = 8
) -> np.ndarray:
    """Pictures in reading order, each above its caption's beginning: uint8 `[height, width, 3]`.

    Args:
      pictures: (image, caption); images of any square size.
      side: side of a picture on the sheet, in pixels.
      columns: how many stand side by side.
    """
    cell, row_height = side + _GAP, side + _GAP + _LABEL_HEIGHT
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (min(columns, len(pictures)) * cell + _GAP, rows * row_height + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (image, caption) in enumerate(pictures):
        top, left = _GAP + number // columns * row_height, _GAP + number % columns * cell
        canvas.paste(Image.fromarray(image).resize((side, side)), (left, top))
        draw.text((left, top + side + 1), _fit(caption, font, side), fill="dimgray", font=font)
    return np.asarray(canvas)


def sheet(
    headers: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int, *, blocks: int = 1
) -> np.ndarray:
    """A captioned comparison: a header above each column, and a caption above each row.

    Args:
      headers: one per column.
      rows: (caption, images); images of any square size, one per column; those of another size are enlarged
        pixel by pixel.
      side: side of a cell in pixels.
      blocks: into how many blocks, side by side, the rows are folded.

    Returns:
      uint8 `[height, width, 3]`.
    """
    per_block = -(-len(rows) // blocks)
    parts = [
        _block(headers, rows[i : i + per_block], side, per_block) for i in range(0, len(rows), per_block)
    ]
    return np.concatenate(parts, axis=1)


def _block(
    headers: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int, height: int
) -> np.ndarray:
    """One block of a sheet, with room for `height` rows."""
    cell, row_height = side + _GAP, side + _GAP + _LABEL_HEIGHT
    size = (len(headers) * cell + 3 * _GAP, _LABEL_HEIGHT + height * row_height + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)
    for j, header in enumerate(headers):
        draw.text((_GAP + j * cell, 2), _fit(header, font, side), fill="black", font=font)
    for i, (caption, images) in enumerate(rows):
        top = _LABEL_HEIGHT + i * row_height
        draw.text((_GAP, top + 2), _fit(caption, font, size[0] - 3 * _GAP), fill="dimgray", font=font)
        for j, image in enumerate(images):
            scaled = Image.fromarray(image)
            if image.shape[0] != side:
                scaled = scaled.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(scaled, (_GAP + j * cell, top + _LABEL_HEIGHT))
    return np.asarray(canvas)


def write_png(path: Path, image: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG whose text chunks hold `metadata`; it appears whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value.replace("\0", ""))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not be there, or its folder may not
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a line to a width in pixels; characters that the font lacks become '?'."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
