"""Solvers: one step from a time t to an earlier time s.

A solver enters the library by its function, in the table of the file that holds it.
"""

from collections.abc import Callable

from diffjax.diffusion.solvers import (
    adams,
    ancestral,
    exponential,
    multistep,
    runge_kutta,
    stochastic,
    unipc,
    wrappers,
)
from diffjax.diffusion.solvers.base import Solver

SOLVERS: dict[str, Callable[..., Solver]] = {
    **ancestral.SOLVERS,
    **runge_kutta.SOLVERS,
    **exponential.SOLVERS,
    **multistep.SOLVERS,
    **unipc.SOLVERS,
    **adams.SOLVERS,
    **stochastic.SOLVERS,
    **wrappers.SOLVERS,
}
