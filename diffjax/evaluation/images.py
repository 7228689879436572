"""Pictures against the very pictures that they should be: PSNR, SSIM, consistency of super-resolution."""

import numpy as np
from scipy import ndimage

from diffjax.data.transforms import downsample
from diffjax.errors import UserError

_RADIUS = 5  # of the window of 11 pixels
_SIGMA = 1.5


def psnr(images: np.ndarray, targets: np.ndarray, *, data_range: float = 255.0) -> np.ndarray:
    """`10 log10(data_range^2 / MSE)` in decibels, of each picture: `[n]`, infinite where they are equal.

    The mean of pictures' PSNR, as papers on super-resolution report it, is not the PSNR of their mean error.

    Args:
      images: `[n, h, w, c]`.
      targets: of the same shape.
      data_range: the largest value less the smallest that there may be: 255 for uint8, 2 for [-1, 1].
    """
    a, b = _pair(images, targets)
    error = ((a - b) ** 2).mean(axis=tuple(range(1, a.ndim)))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def ssim(
    images: np.ndarray, targets: np.ndarray, *, data_range: float = 255.0, border: bool = True
) -> np.ndarray:
    """Structural similarity of each picture (Wang et al., 2004): `[n]`, 1 where they are equal.

    A Gaussian window of 11 pixels with sigma 1.5, k1 = 0.01, k2 = 0.03, biased variances, the mean over
    places and channels. Papers that give it for luma alone have other numbers.

    Args:
      images: `[n, h, w, c]` of at least 11 x 11 pixels.
      targets: of the same shape.
      data_range: as in `psnr`.
      border: whether places count where the window needs pixels beyond the edge, which are mirrored, as in
        torchmetrics. Without them it is the original, and scikit-image's with `gaussian_weights=True,
        use_sample_covariance=False`.
    """
    a, b = _pair(images, targets)
    if min(a.shape[1:3]) <= 2 * _RADIUS:
        raise UserError(
            f"SSIM needs pictures of at least 11 x 11 pixels; these have {a.shape[1]} x {a.shape[2]}."
        )
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a**2) - mean_a**2, _blurred(b**2) - mean_b**2
    cov = _blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2.0 * mean_a * mean_b + c1) * (2.0 * cov + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    if not border:
        likeness = likeness[:, _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
    return likeness.mean(axis=(1, 2, 3))


def consistency(images: np.ndarray, low_res: np.ndarray) -> np.ndarray:
    """The PSNR of super-resolved pictures, averaged over boxes, against what they were made from: `[n]`.

    Args:
      images: uint8 `[n, h, w, c]`.
      low_res: uint8 `[n, h/f, w/f, c]`.
    """
    factor = images.shape[1] // low_res.shape[1]
    return psnr(downsample(images, factor), low_res)


def _pair(images: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != targets.shape or images.ndim != 4:
        raise ValueError(
            f"images are {images.shape}, targets {targets.shape}; expected the same [n, h, w, c]"
        )
    return np.asarray(images, np.float64), np.asarray(targets, np.float64)


def _blurred(x: np.ndarray) -> np.ndarray:
    """Weighted means over the window around each pixel."""
    for axis in (1, 2):
        x = ndimage.gaussian_filter1d(x, _SIGMA, axis=axis, radius=_RADIUS, mode="mirror")
    return x
