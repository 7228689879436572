import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from diffjax.data.decode import Limits, PictureError, Reason, check_header, decode

LOSSLESS = [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("GIF", {})]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encode(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def one(image, file_format="PNG", **options):
    """The one colour of a picture of one colour."""
    pixels = decode(encode(image, file_format, **options), 8)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.ptp(pixels, axis=(0, 1)).max() == 0
    return tuple(map(int, pixels[0, 0]))


def refused(data, **limits):
    """Why a file is refused, by `decode` and, if the header shows it, by `check_header`."""
    with pytest.raises(PictureError) as error:
        decode(data, 8, limits=Limits(**limits))
    return error.value.reason


def png(width, height, depth, colour, rows):
    """A PNG file made by hand."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("file_format", "options"), LOSSLESS)
def test_formats(file_format, options):
    pixels = NOISE[:, :40] // 128 * 255  # eight colours, which a palette can hold
    data = encode(Image.fromarray(pixels), file_format, **options)
    np.testing.assert_array_equal(decode(data, 40), pixels)


def test_jpeg_is_near():
    smooth = np.linspace(0, 255, 32).astype(np.uint8)[:, None, None] * np.ones((1, 32, 3), np.uint8)
    difference = decode(encode(Image.fromarray(smooth), "JPEG", quality=95), 32).astype(int) - smooth
    assert abs(difference).max() < 6


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (64, 64), (65, 129), (16, 20), (7, 9)])
def test_scaled_and_cropped_as_in_guided_diffusion(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    np.testing.assert_array_equal(decode(encode(image), 16), center_crop_arr(image, 16))


def center_crop_arr(pil_image, image_size):
    """The function of that name of github.com/openai/guided-diffusion (MIT licence)."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


# What the tag says the first row and column of the stored picture are (TIFF 6.0, page 36).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, file_format):
    upright = np.kron([[0, 90], [180, 255]], np.ones((8, 8)))[:, :, None].astype(np.uint8).repeat(3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), file_format, exif=exif)
    np.testing.assert_allclose(decode(data, 16), upright, atol=3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_exif_nonsense_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(NOISE[:, :40]), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, 40), NOISE[:, :40])
    broken = encode(Image.fromarray(NOISE[:, :40]), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(broken, 40), NOISE[:, :40])


def test_transparency_shows_the_background():
    half = Image.new("RGBA", (9, 9), (200, 0, 0, 51))  # a fifth
    assert one(half) == (244, 204, 204)
    assert one(half, "WEBP", lossless=True) == (244, 204, 204)
    assert one(Image.new("LA", (9, 9), (100, 0))) == (255, 255, 255)
    clear = encode(Image.new("RGBA", (9, 9), (200, 10, 20, 0)))
    np.testing.assert_array_equal(decode(clear, 2, background=(1, 2, 3)), np.full((2, 2, 3), (1, 2, 3)))


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette(file_format):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert one(image, file_format) == (10, 200, 30)
    assert one(image, file_format, transparency=1) == (255, 255, 255)


def test_a_transparent_colour_of_pictures_without_alpha():
    assert one(Image.new("RGB", (9, 9), (1, 2, 3)), transparency=(1, 2, 3)) == (255, 255, 255)
    assert one(Image.new("L", (9, 9), 7), transparency=7) == (255, 255, 255)


def test_grey_bits_and_cmyk():
    assert one(Image.new("L", (9, 9), 77)) == (77, 77, 77)
    assert one(Image.new("1", (9, 9), 1)) == (255, 255, 255)
    assert one(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF") == (255, 0, 0)
    red = one(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    np.testing.assert_allclose(red, (255, 0, 0), atol=3)


@pytest.mark.parametrize(
    ("stored", "shown"), [(0, 0), (257 * 100, 100), (65535, 255), (300, 1), (25900, 101)]
)
def test_sixteen_bits(stored, shown):
    by_hand = png(8, 8, 16, 0, (b"\0" + struct.pack(">8H", *[stored] * 8)) * 8)
    np.testing.assert_array_equal(decode(by_hand, 8), np.full((8, 8, 3), shown))
    deep = Image.fromarray(np.full((9, 9), stored, np.uint16))
    assert one(deep, "TIFF") == (shown,) * 3
    assert one(Image.fromarray(np.full((9, 9), stored, np.int32)), "TIFF") == (shown,) * 3


def test_sixteen_bits_of_colour():
    data = png(8, 8, 16, 2, (b"\0" + struct.pack(">3H", 257 * 10, 257 * 20, 257 * 250) * 8) * 8)
    np.testing.assert_array_equal(decode(data, 8), np.full((8, 8, 3), (10, 20, 250)))


def test_floats():
    grey = Image.fromarray(np.full((9, 9), 0.2, np.float32))
    assert one(grey, "TIFF") == (51, 51, 51)
    for wrong in (1.5, -0.1, np.nan, np.inf):
        data = encode(Image.fromarray(np.full((9, 9), wrong, np.float32)), "TIFF")
        assert refused(data) is Reason.PIXELS


def test_where_white_is_zero():
    for array in (np.full((9, 9), 257 * 55, np.uint16), np.full((9, 9), 55 / 255, np.float32)):
        assert one(Image.fromarray(array), "TIFF", tiffinfo={262: 0}) == (200, 200, 200)
    assert one(Image.new("L", (9, 9), 55), "TIFF", tiffinfo={262: 0}) == (
        55,
        55,
        55,
    )  # Pillow inverts it twice


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_show_their_first_frame(file_format):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert one(frames[0], file_format, save_all=True, append_images=frames[1:], **options) == (255, 0, 0)


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
        (b"<!DOCTYPE html><html><body>404</body></html>", Reason.FORMAT),
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
    data = png(*size, 8, 2, b"")  # the header is right, and there are no pixels
    assert refused(data, **limits) is reason
    with pytest.raises(PictureError, match=f"{size[0]}x{size[1]}"):
        check_header(io.BytesIO(data), Limits(**limits))


def test_sizes_within_the_limits_pass():
    check_header(io.BytesIO(png(100, 10, 8, 2, b"")), Limits(max_pixels=1000, max_side=100, min_side=10))


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
    refused(png(60000, 60000, 8, 2, b""))
    decode(encode(Image.fromarray(NOISE)), 8)
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
