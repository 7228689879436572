"""Pictures as files: encoded, made by hand, refused; and a folder of them, some of which cannot be used."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffjax.data.decode import Limits, PictureError, decode
from diffjax.data.folder import load_folder

# Headers say nothing of what is wrong with these; they are found when they are decoded.
TRUNCATED = (3, 7, 8)
EMPTY = (5,)

LOSSLESS = [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("GIF", {})]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def write_pictures(folder, count=24, *, truncated=TRUNCATED, empty=EMPTY, leave_out=()):
    """Write `count` JPEG files of 20 x 16 pixels with captions, but those to be left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if i in leave_out:
            continue
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((20, 16), Image.Resampling.BICUBIC)
        data = b"" if i in empty else encode(image, "JPEG", quality=95)
        (folder / f"{i:02d}.jpg").write_bytes(data[:-40] if i in truncated else data)
        (folder / f"{i:02d}.txt").write_text(f"picture {i}", encoding="utf-8")
    return folder


def encode(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(red):
    """A PNG file of one colour, which tells it from others: see `reds`."""
    return encode(Image.new("RGB", (9, 9), (red, 0, 0)))


def picture(path, red=0, size=(9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)


def reds(source):
    """The reds of a source's pictures."""
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


def raw_png(width, height, depth, colour, rows, **chunks):
    """A PNG file made by hand."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    header += b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refused(data, **limits):
    """Why a file is refused, by `decode` and, if the header shows it, by `check_header`."""
    with pytest.raises(PictureError) as error:
        decode(data, 8, limits=Limits(**limits))
    return error.value.reason


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_small(folder, **options):
    """The pictures of the fixture `folder`, at 4 px."""
    return load_folder(folder.parent / "cache", folder=folder, **{"resolution": 4} | options)
