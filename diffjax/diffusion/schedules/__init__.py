"""Noise schedules: how much signal and how much noise there is at each time.

A schedule enters the library by its function, in the table of the file that holds it.
"""

from collections.abc import Callable

from diffjax.diffusion.schedules import betas, continuous
from diffjax.diffusion.schedules.base import (
    Coeffs,
    Schedule,
    corrupt,
    expand,
    from_logsnr,
    logsnr,
    shifted,
    time_at,
    widen,
)
from diffjax.diffusion.schedules.betas import ddpm, from_betas
from diffjax.diffusion.schedules.continuous import (
    cosine,
    edm,
    laplace,
    linear_flow,
    linear_vp,
    polynomial,
    sigmoid,
    sub_vp,
    trigonometric,
    ve,
    vp,
)

__all__ = [
    "Coeffs",
    "Schedule",
    "corrupt",
    "cosine",
    "ddpm",
    "edm",
    "expand",
    "from_betas",
    "from_logsnr",
    "laplace",
    "linear_flow",
    "linear_vp",
    "logsnr",
    "polynomial",
    "shifted",
    "sigmoid",
    "sub_vp",
    "time_at",
    "trigonometric",
    "ve",
    "vp",
    "widen",
]

SCHEDULES: dict[str, Callable[..., Schedule]] = {**continuous.SCHEDULES, **betas.SCHEDULES}
