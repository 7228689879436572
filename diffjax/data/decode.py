"""From the bytes of a picture file, which anyone may have written, to a square of RGB pixels."""

import dataclasses
import enum
import io
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

# How a file of each format begins, and what reads it. `Image.open` would try more, and would warn of large
# pictures before we can refuse them.
_FORMATS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)
# Other files that are taken for pictures, so that the refusal can say what they are.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"<?xml", "XML, perhaps SVG"),
    (b"<svg", "SVG"),
    (b"<", "XML or HTML"),
    (b"{", "JSON"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the files themselves"),
)
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_ORIENTATION = 0x0112  # the EXIF tag; its value 1 means upright
_WHITE_IS_ZERO = 262, 0  # a TIFF tag, and the value that Pillow heeds in pictures of 8 bits alone
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Reason(enum.StrEnum):
    """Why a picture is refused."""

    EMPTY = "the file is empty"
    FILE_SIZE = "the file has too many bytes"
    HTML = "the file is a web page, not a picture"
    FORMAT = "not a PNG, JPEG, WebP, GIF, BMP or TIFF file"
    TOO_LARGE = "the picture is too large"
    TOO_SMALL = "the picture is too small"
    TOO_NARROW = "the picture is too long and narrow"
    ANIMATED = "the picture is animated, or has several pages"
    DAMAGED = "the file is truncated or damaged"
    PIXELS = "the kind of pixels is not supported"


class PictureError(ValueError):
    """A picture is refused, for a `reason`."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else str(reason))
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which pictures are accepted; all but `max_bytes` is decided by the header, before anything is decoded.

    Attributes:
      max_bytes: size of the file.
      min_side: length of the shorter side in pixels.
      max_side: length of the longer side.
      max_pixels: height times width.
      max_aspect: longer side divided by shorter side.
    """

    max_bytes: int = 2**27
    min_side: int = 1
    max_side: int = 2**15
    max_pixels: int = 2**26
    max_aspect: float = 10.0


DEFAULT_LIMITS = Limits()


def decode(
    data: bytes,
    resolution: int,
    *,
    background: Colour = WHITE,
    animated: str = "first",
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Decode a picture and bring it to a square.

    What kind of file it is, its first bytes say, not its name. It is shown upright as its EXIF orientation
    says, laid on `background` where it is transparent. Colour profiles are not applied; CMYK in JPEG is taken
    to be inverted, as Adobe's programs write it and browsers show it. The square is the middle of the
    picture, scaled as in the ImageNet models of Dhariwal and Nichol (2021, `center_crop_arr`): halved by
    averaging boxes while the shorter side is at least twice the resolution, then resized bicubically, with
    antialiasing.

    Args:
      data: the bytes of a file.
      resolution: height and width of the result.
      background: RGB, 0 to 255.
      animated: "first" to take the first frame of an animation or page of a TIFF, "reject" to refuse those.
      limits: which pictures are accepted.

    Returns:
      `[resolution, resolution, 3]` uint8.

    Raises:
      PictureError: if the picture is refused.
    """
    if len(data) > limits.max_bytes:
        raise PictureError(Reason.FILE_SIZE, f"{len(data)}, at most {limits.max_bytes}")
    image = _open(io.BytesIO(data), limits, animated)
    try:
        image.load()
        turned = _upright(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow has no common class for what a damaged file may cause
        raise PictureError(Reason.DAMAGED, str(error)) from error
    return _central_square(_to_rgb(turned, background, inverted=_is_inverted(image)), resolution)


def check_header(
    file: BinaryIO, limits: Limits = DEFAULT_LIMITS, *, animated: str = "first"
) -> tuple[int, int]:
    """Refuse a file, open at its start, whose header is enough to see that `decode` would refuse it.

    Returns:
      width and height in pixels, before it is turned upright.

    Raises:
      PictureError: if the picture is refused.
    """
    return _open(file, limits, animated).size


def _open(file: BinaryIO, limits: Limits, animated: str) -> ImageFile.ImageFile:
    """Read the header of a picture."""
    start = file.read(64)
    reader = _reader(start)
    if reader is WebPImagePlugin.WebPImageFile:  # it makes room for the picture while reading the header
        _check_size(_webp_size(start), limits)
    file.seek(0)
    try:
        image = reader(file)
        # More frames are looked for only where they matter: in a GIF that takes a while.
        several = animated == "reject" and getattr(image, "is_animated", False)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(Reason.TOO_LARGE, str(error)) from error
    except Exception as error:
        raise PictureError(Reason.DAMAGED, str(error)) from error

    _check_size(image.size, limits)
    if several:
        raise PictureError(Reason.ANIMATED)
    return image


def _reader(start: bytes) -> type[ImageFile.ImageFile]:
    """What reads a file that begins with `start`."""
    if not start:
        raise PictureError(Reason.EMPTY)
    reader = next((reader for prefix, reader in _FORMATS if start.startswith(prefix)), None)
    if reader is not None and (not start.startswith(b"RIFF") or start[8:12] == b"WEBP"):
        return reader
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_HTML):
        raise PictureError(Reason.HTML)
    if start[4:8] == b"ftyp":
        raise PictureError(Reason.FORMAT, f"{start[8:12].decode('ascii', 'replace')}: AVIF, HEIC or a film")
    raise PictureError(Reason.FORMAT, next((name for prefix, name in _OTHERS if text.startswith(prefix)), ""))


def _webp_size(start: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the start of a WebP file."""
    kind, number = start[12:16], int.from_bytes
    if kind == b"VP8X":
        return number(start[24:27], "little") + 1, number(start[27:30], "little") + 1
    if kind == b"VP8L":
        bits = number(start[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return number(start[26:28], "little") & 0x3FFF, number(start[28:30], "little") & 0x3FFF
    raise PictureError(Reason.DAMAGED, "no picture in a WebP file")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    short, long = sorted(size)
    shown = f"{size[0]}x{size[1]} pixels"
    if short < max(limits.min_side, 1):
        raise PictureError(Reason.TOO_SMALL, shown)
    if long > limits.max_side or short * long > limits.max_pixels:
        raise PictureError(Reason.TOO_LARGE, shown)
    if long > limits.max_aspect * short:
        raise PictureError(Reason.TOO_NARROW, shown)


def _upright(image: ImageFile.ImageFile) -> Image.Image:
    """Turn a loaded picture as its EXIF data says; Pillow has turned a TIFF, and has forgotten the tag."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # EXIF data that cannot be read say nothing
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _is_inverted(image: ImageFile.ImageFile) -> bool:
    tag, value = _WHITE_IS_ZERO
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(tag) == value


def _to_rgb(image: Image.Image, background: Colour, *, inverted: bool) -> Image.Image:
    """Convert any mode to RGB; Pillow's own conversion clips more than 8 bits and drops transparency."""
    if image.mode.startswith("I"):
        values, clear = np.asarray(image), image.info.get("transparency")
        image = _to_grey(values, 65535, inverted)
        if isinstance(clear, int):  # the grey that stands for transparency in a PNG
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif image.mode == "F":
        image = _to_grey(np.asarray(image), 1, inverted)
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode == "La":  # premultiplied grey: only the way over "LA" is known
            image = image.convert("LA")
        opaque = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    except ValueError as error:
        raise PictureError(Reason.PIXELS, f"mode {image.mode}") from error


def _to_grey(values: np.ndarray, white: int, inverted: bool) -> Image.Image:
    """Bring one channel of 0 to `white` to 8 bits; there is no telling what other values would mean."""
    if not (values.min() >= 0 and values.max() <= white):  # so that NaN is refused as well
        raise PictureError(Reason.PIXELS, f"values from {values.min()} to {values.max()}, not 0 to {white}")
    grey = np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey)


def _central_square(image: Image.Image, resolution: int) -> np.ndarray:
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image)[top : top + resolution, left : left + resolution].copy()
