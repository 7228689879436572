import io
import struct

import numpy as np
import pytest
from pictures import LOSSLESS, NOISE, encode, raw_png, refused
from PIL import Image, ImageCms

from diffjax.data.decode import PictureError, Reason, check_header, decode


def one(image, file_format="PNG", **options):
    """The one colour of a picture of one colour."""
    pixels = decode(encode(image, file_format, **options), 8)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.ptp(pixels, axis=(0, 1)).max() == 0
    return tuple(map(int, pixels[0, 0]))


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
    by_hand = raw_png(8, 8, 16, 0, (b"\0" + struct.pack(">8H", *[stored] * 8)) * 8)
    np.testing.assert_array_equal(decode(by_hand, 8), np.full((8, 8, 3), shown))
    deep = Image.fromarray(np.full((9, 9), stored, np.uint16))
    assert one(deep, "TIFF") == (shown,) * 3
    assert one(Image.fromarray(np.full((9, 9), stored, np.int32)), "TIFF") == (shown,) * 3


def test_sixteen_bits_of_grey_with_a_transparent_one():
    rows = b"".join(b"\0" + struct.pack(">8H", *[1000, 2570] * 4) for _ in range(8))
    pixels = decode(raw_png(8, 8, 16, 0, rows, tRNS=struct.pack(">H", 1000)), 8, background=(1, 2, 3))
    assert pixels[0, :2].tolist() == [[1, 2, 3], [10, 10, 10]]


def test_sixteen_bits_with_alpha():
    for colour, levels in ((4, 1), (6, 3)):
        row = b"\0" + struct.pack(f">{levels + 1}H", *[257 * 90] * levels, 0) * 8
        assert decode(raw_png(8, 8, 16, colour, row * 8), 8, background=(7, 8, 9))[0, 0].tolist() == [
            7,
            8,
            9,
        ]
        row = b"\0" + struct.pack(f">{levels + 1}H", *[257 * 90] * levels, 65535) * 8
        assert decode(raw_png(8, 8, 16, colour, row * 8), 8)[0, 0].tolist() == [90, 90, 90]


def test_sixteen_bits_of_colour():
    data = raw_png(8, 8, 16, 2, (b"\0" + struct.pack(">3H", 257 * 10, 257 * 20, 257 * 250) * 8) * 8)
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
def test_animations_show_their_first_frame_or_are_refused(file_format):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    several = {"save_all": True, "append_images": frames[1:], **options}
    assert one(frames[0], file_format, **several) == (255, 0, 0)
    data = encode(frames[0], file_format, **several)
    with pytest.raises(PictureError, match="animated"):
        check_header(io.BytesIO(data), animated="reject")
    with pytest.raises(PictureError, match="animated"):
        decode(data, 8, animated="reject")
    still = encode(frames[2], file_format, **options)
    assert decode(still, 8, animated="reject")[0, 0].tolist() == [0, 0, 255]


def flat_jpeg(levels, adobe):
    """A JPEG file of 8x8 pixels and four components, each of one level; see ITU-T T.81, Annexes B and F.

    With steps of 8, the one coefficient of a component is its level less 128; a Huffman code of four bits
    tells its size, and one of one bit ends the block.
    """

    def segment(marker, data):
        return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data

    bits = ""
    for level in levels:
        value = level - 128
        size = abs(value).bit_length()
        bits += (
            f"{size:04b}" + (f"{value if value > 0 else value + 2**size - 1:0{size}b}" if size else "") + "0"
        )
    scan = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
    parts = [b"\xff\xd8"]
    if adobe is not None:
        parts.append(segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, adobe)))
    parts.append(segment(0xDB, b"\0" + b"\x08" * 64))
    parts.append(segment(0xC0, struct.pack(">BHHB", 8, 8, 8, 4) + b"\0\x11\0\1\x11\0\2\x11\0\3\x11\0"))
    parts.append(segment(0xC4, b"\0" + bytes((0, 0, 0, 9, *[0] * 12)) + bytes(range(9))))
    parts.append(segment(0xC4, b"\x10" + bytes((1, *[0] * 15)) + b"\0"))
    parts.append(segment(0xDA, b"\4" + b"\0\0\1\0\2\0\3\0" + b"\0\x3f\0"))
    return b"".join(parts) + scan.replace(b"\xff", b"\xff\0") + b"\xff\xd9"


def test_cmyk_jpeg_is_inverted():
    # A level of 255 is no ink; what is seen is the product of a colour's level and that of black.
    for adobe in (None, 0):
        assert decode(flat_jpeg((255, 55, 100, 255), adobe), 8)[0, 0].tolist() == [255, 55, 100]
        assert decode(flat_jpeg((255, 255, 255, 0), adobe), 8)[0, 0].tolist() == [0, 0, 0]
        half = decode(flat_jpeg((200, 100, 50, 128), adobe), 8)[0, 0]
        np.testing.assert_allclose(half, [100, 50, 25], atol=1)
    # YCCK holds the RGB of which a level of cyan, magenta or yellow is what is missing to 255.
    assert decode(flat_jpeg((200, 128, 128, 255), 2), 8)[0, 0].tolist() == [55, 55, 55]


def test_progressive_jpegs_are_the_same_picture():
    image = Image.fromarray(NOISE)
    baseline, progressive = (encode(image, "JPEG", progressive=on) for on in (False, True))
    assert baseline != progressive
    np.testing.assert_array_equal(decode(baseline, 40), decode(progressive, 40))


def test_colour_profiles_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for file_format in ("PNG", "TIFF"):
        assert one(Image.new("RGB", (9, 9), (10, 200, 30)), file_format, icc_profile=profile) == (10, 200, 30)
