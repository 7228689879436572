from pathlib import Path

import numpy as np
import pytest

from diffjax.data.transforms import downsample
from diffjax.errors import UserError
from diffjax.evaluation.images import consistency, psnr, ssim

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "measures.npz")
X, Y = GOLDEN["pictures/x"], GOLDEN["pictures/y"]


def pictures(count=3, side=16):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_psnr_against_skimage():
    np.testing.assert_allclose(psnr(X, Y, data_range=1.0), GOLDEN["psnr/skimage"], rtol=1e-9)


def test_psnr_of_bytes_does_not_wrap():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == pytest.approx([0.0])
    assert psnr(black, black + np.uint8(1)) == pytest.approx([20.0 * np.log10(255.0)])
    assert psnr(white, white) == [np.inf]


def test_ssim_against_others():
    found = ssim(X, Y, data_range=1.0)
    np.testing.assert_allclose(found, GOLDEN["ssim/torchmetrics"], rtol=1e-6)
    found = ssim(X, Y, data_range=1.0, border=False)
    np.testing.assert_allclose(found, GOLDEN["ssim/skimage"], rtol=1e-6)


def test_ssim_in_closed_form():
    assert ssim(pictures(), pictures()) == pytest.approx([1.0] * 3)
    grey, light = np.full((1, 16, 16, 3), 100.0), np.full((1, 16, 16, 3), 150.0)
    c1 = (0.01 * 255.0) ** 2
    expected = (2.0 * 100.0 * 150.0 + c1) / (100.0**2 + 150.0**2 + c1)  # without structure, luminance alone
    assert ssim(grey, light) == pytest.approx([expected])


def test_the_range_of_values_does_not_matter():
    a, b = pictures().astype(np.float64), Y[:, :16, :16] * 255.0
    for measure in (psnr, ssim):
        np.testing.assert_allclose(measure(a / 255.0, b / 255.0, data_range=1.0), measure(a, b), rtol=1e-9)


def test_consistency():
    images = pictures()
    small = downsample(images, 4)
    assert (consistency(images, small) == np.inf).all()
    off = small.astype(int) + np.where(small < 128, 2, -2)
    np.testing.assert_allclose(consistency(images, off.astype(np.uint8)), 20.0 * np.log10(255.0 / 2.0))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected the same \[n, h, w, c\]"):
        psnr(pictures(3), pictures(2))
    with pytest.raises(UserError, match="at least 11 x 11 pixels; these have 8 x 8"):
        ssim(pictures(1, 8), pictures(1, 8))
