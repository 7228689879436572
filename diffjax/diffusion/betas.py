from diffjax.diffusion.schedules.betas import *  # noqa
