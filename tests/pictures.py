"""A folder of small pictures, some of which cannot be used."""

import io

import numpy as np
from PIL import Image

# Headers say nothing of what is wrong with these; they are found when they are decoded.
TRUNCATED = (3, 7, 8)
EMPTY = (5,)


def write_pictures(folder, count=24, *, truncated=TRUNCATED, empty=EMPTY, leave_out=()):
    """Write `count` JPEG files of 20 x 16 pixels with captions, but those to be left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if i in leave_out:
            continue
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((20, 16), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        data = b"" if i in empty else buffer.getvalue()
        (folder / f"{i:02d}.jpg").write_bytes(data[:-40] if i in truncated else data)
        (folder / f"{i:02d}.txt").write_text(f"picture {i}", encoding="utf-8")
    return folder
