"""Mutated pictures and random bytes: a picture comes out, or one of the documented errors."""

import io
import resource
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffjax.data.captions import CaptionError, clean
from diffjax.data.decode import Limits, PictureError, check_header, decode

# Small enough that what a header may ask for is small, too.
LIMITS = Limits(max_bytes=2**20, max_pixels=2**20, max_side=2**12)
MEMORY = 64 * 2**10  # KiB, Pillow's own included


def encoded(file_format, mode="RGB", frames=1, **options):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)).convert(
        mode
    )
    file = io.BytesIO()
    if frames > 1:
        options |= {"save_all": True, "append_images": [pixels.rotate(90 * i) for i in range(1, frames)]}
    pixels.save(file, file_format, **options)
    return file.getvalue()


def exif():
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


SEEDS = [
    encoded("PNG"),
    encoded("PNG", "P", transparency=3),
    encoded("PNG", "LA", frames=3),
    encoded("JPEG", exif=exif()),
    encoded("JPEG", progressive=True),
    encoded("JPEG", "CMYK"),
    encoded("WEBP"),
    encoded("WEBP", "RGBA", lossless=True, frames=2, exif=exif()),
    encoded("GIF", "P", frames=3),
    encoded("BMP"),
    encoded("BMP", "1"),
    encoded("TIFF", exif=exif()),
    encoded("TIFF", "I;16"),
    encoded("TIFF", "I;16", tiffinfo={262: 0}),
    encoded("TIFF", compression="tiff_lzw", frames=2),
    encoded("TIFF", "L", compression="jpeg"),
]


@st.composite
def mutated(draw, seeds=SEEDS):
    """A file with bytes changed, taken out, put in or doubled, mostly near its beginning."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        near = draw(st.booleans())
        at = draw(st.integers(0, max(0, min(len(data), 200 if near else len(data)) - 1)))
        kind = draw(st.integers(0, 5))
        if kind <= 2:
            some = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(some)] = some
        elif kind == 3:
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == 4:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        else:
            del data[at:]
    return bytes(data)


def use(data, animated):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of some of the damage in this way
        header_is_good = True
        try:
            check_header(io.BytesIO(data), LIMITS, animated=animated)
        except PictureError:
            header_is_good = False
        try:
            pixels = decode(data, 16, limits=LIMITS, animated=animated)
        except PictureError:
            return
        assert header_is_good
        assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)


FAST = settings(
    max_examples=200, derandomize=True, deadline=5000, database=None, suppress_health_check=list(HealthCheck)
)
SLOW = settings(FAST, max_examples=10_000)
ANIMATED = st.sampled_from(["first", "reject"])


@pytest.mark.parametrize("data", SEEDS)
def test_what_is_mutated_can_be_decoded(data):
    assert decode(data, 16, limits=LIMITS).shape == (16, 16, 3)


@FAST
@given(mutated(), ANIMATED)
def test_mutated_pictures(data, animated):
    use(data, animated)


@pytest.mark.slow
@SLOW
@given(mutated(), ANIMATED)
def test_ten_thousand_mutated_pictures(data, animated):
    use(data, animated)


@FAST
@given(
    st.sampled_from([b"", *{data[:size] for data in SEEDS for size in (4, 12, 30)}]),
    st.binary(max_size=300),
    ANIMATED,
)
def test_random_bytes_after_a_good_start(start, data, animated):
    use(start + data, animated)


def test_the_memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in SEEDS:
        for at in range(0, 60, 3):
            use(data[:at] + b"\xff\xff\xff" + data[at + 3 :], "first")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + MEMORY


@FAST
@example(b"\xff\xfea\0")
@example("\ud800")
@given(st.one_of(st.binary(), st.text(), st.none(), st.integers(), st.lists(st.text())))
def test_captions(value):
    try:
        caption = clean(value)
    except CaptionError:
        return
    assert caption == caption.strip()
    assert "\0" not in caption
    caption.encode("utf-8")
    assert isinstance(value, (str, bytes, type(None)))
