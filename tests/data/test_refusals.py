import io
import struct
import warnings

import pytest
from pictures import LOSSLESS, NOISE, encode, raw_png, refused
from PIL import Image

from diffjax.data.decode import Limits, PictureError, Reason, check_header, decode


def test_a_webp_is_measured_before_there_is_room_for_it():
    for options in ({}, {"lossless": True}, {"lossless": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}):
        data = encode(Image.new("RGB", (300, 200)), "WEBP", **options)
        assert refused(data[:40], max_side=299) is Reason.TOO_LARGE
        assert refused(data[:40], min_side=201) is Reason.TOO_SMALL
        assert decode(data, 8, limits=Limits(min_side=200, max_side=300)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("file_format", "options"), [*LOSSLESS, ("JPEG", {}), ("JPEG", {"progressive": True})]
)
def test_truncated_files_are_refused(file_format, options):
    data = encode(Image.fromarray(NOISE), file_format, **options)
    for part in (0.01, 0.1, 0.5, 0.9):
        assert refused(data[: max(13, int(part * len(data)))]) in (Reason.DAMAGED, Reason.TOO_SMALL)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"<!DOCTYPE html><html><body>404</body></html>", Reason.HTML),
        (b"\xef\xbb\xbf\r\n <HTML lang='en'>", Reason.HTML),
        (b"RIFF\x24\0\0\0WAVEfmt ", Reason.FORMAT),
        (b"\x89PNG", Reason.FORMAT),
        (b"\xff\xd8\xff\xe0 and no more", Reason.DAMAGED),
        (b"GIF89a", Reason.DAMAGED),
        (b"II*\0\xff\xff\xff\xff", Reason.DAMAGED),
    ],
)
def test_what_is_no_picture_is_refused(data, reason):
    assert refused(data) is reason
    with pytest.raises(PictureError, match=str(reason)):
        check_header(io.BytesIO(data))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns=", "SVG"),
        (b'{"error": 403}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    ],
)
def test_a_refusal_says_what_the_file_is(start, name):
    with pytest.raises(PictureError, match=f"^not a PNG.*{name}"):
        decode(start, 8)


def test_other_formats_are_refused():
    for file_format in ("PPM", "ICO", "TGA", "PCX", "SGI"):
        assert refused(encode(Image.new("RGB", (16, 16)), file_format)) is Reason.FORMAT


@pytest.mark.parametrize(
    ("size", "limits", "reason"),
    [
        ((60000, 60000), {}, Reason.TOO_LARGE),  # Pillow alone would warn, or raise an error of its own
        ((12000, 9000), {}, Reason.TOO_LARGE),
        ((40000, 10), {"max_aspect": 1e9}, Reason.TOO_LARGE),
        ((101, 99), {"max_pixels": 9998}, Reason.TOO_LARGE),
        ((64, 65), {"max_side": 64}, Reason.TOO_LARGE),
        ((1000, 10), {}, Reason.TOO_NARROW),
        ((10, 101), {}, Reason.TOO_NARROW),
        ((63, 64), {"min_side": 64}, Reason.TOO_SMALL),
    ],
)
def test_sizes_are_refused_by_the_header(size, limits, reason):
    data = raw_png(*size, 8, 2, b"")  # the header is right, and there are no pixels
    assert refused(data, **limits) is reason
    with pytest.raises(PictureError, match=f"{size[0]}x{size[1]}"):
        check_header(io.BytesIO(data), Limits(**limits))


def test_sizes_within_the_limits_pass():
    check_header(io.BytesIO(raw_png(100, 10, 8, 2, b"")), Limits(max_pixels=1000, max_side=100, min_side=10))


def test_a_gif_whose_frame_is_larger_than_its_screen():
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0) + b"\x02\x02\x44\x01\x00;"
    assert refused(screen + frame) is Reason.TOO_LARGE


def test_files_too_long_are_refused():
    data = encode(Image.new("RGB", (9, 9)))
    assert refused(data, max_bytes=len(data) - 1) is Reason.FILE_SIZE
    assert decode(data, 8, limits=Limits(max_bytes=len(data))).shape == (8, 8, 3)


def test_no_global_state_is_changed():
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    refused(raw_png(60000, 60000, 8, 2, b""))
    decode(encode(Image.fromarray(NOISE)), 8)
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
