"""The networks of public checkpoints that denoise."""

from diffjax.interop import dit, flux, sd3, unet2d
from diffjax.interop.families import Family

FAMILIES: dict[str, Family] = {**dit.FAMILIES, **sd3.FAMILIES, **flux.FAMILIES, **unet2d.FAMILIES}
