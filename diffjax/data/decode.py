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
    FORMAT = "not a PNG, JPEG, WebP, GIF, BMP or TIFF file"
    TOO_LARGE = "the picture is too large"
    TOO_SMALL = "the picture is too small"
    TOO_NARROW = "the picture is too long and narrow"
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
    data: bytes, resolution: int, *, background: Colour = WHITE, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """Decode a picture and bring it to a square.

    The first frame of an animation is taken, upright as its EXIF orientation says, laid on `background`
    where it is transparent. Colour profiles are not applied. The square is the middle of the picture, scaled
    as in the ImageNet models of Dhariwal and Nichol (2021, `center_crop_arr`): halved by averaging boxes
    while the shorter side is at least twice the resolution, then resized bicubically, with antialiasing.

    Args:
      data: the bytes of a file.
      resolution: height and width of the result.
      background: RGB, 0 to 255.
      limits: which pictures are accepted.

    Returns:
      `[resolution, resolution, 3]` uint8.

    Raises:
      PictureError: if the picture is refused.
    """
    if len(data) > limits.max_bytes:
        raise PictureError(Reason.FILE_SIZE, f"{len(data)}, at most {limits.max_bytes}")
    image = _open(io.BytesIO(data), limits)
    try:
        image.load()
        turned = _upright(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow has no common class for what a damaged file may cause
        raise PictureError(Reason.DAMAGED, str(error)) from error
    return _central_square(_to_rgb(turned, background, inverted=_is_inverted(image)), resolution)


def check_header(file: BinaryIO, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse a file, open at its start, whose header is enough to see that `decode` would refuse it.

    Raises:
      PictureError: if the picture is refused.
    """
    _open(file, limits)


def _open(file: BinaryIO, limits: Limits) -> ImageFile.ImageFile:
    """Read the header of a picture."""
    start = file.read(12)
    if not start:
        raise PictureError(Reason.EMPTY)
    reader = next((reader for prefix, reader in _FORMATS if start.startswith(prefix)), None)
    if reader is None or (start.startswith(b"RIFF") and start[8:] != b"WEBP"):
        raise PictureError(Reason.FORMAT)
    file.seek(0)
    try:
        image = reader(file)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(Reason.TOO_LARGE, str(error)) from error
    except Exception as error:
        raise PictureError(Reason.DAMAGED, str(error)) from error

    short, long = sorted(image.size)
    size = f"{image.width}x{image.height} pixels"
    if short < max(limits.min_side, 1):
        raise PictureError(Reason.TOO_SMALL, size)
    if long > limits.max_side or short * long > limits.max_pixels:
        raise PictureError(Reason.TOO_LARGE, size)
    if long > limits.max_aspect * short:
        raise PictureError(Reason.TOO_NARROW, size)
    return image


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
        image = _to_grey(np.asarray(image), 65535, inverted)
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
