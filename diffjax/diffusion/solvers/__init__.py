"""Solvers: one step from a time t to an earlier time s.

A solver enters the library by its function, in the table of the file that holds it.
"""

from collections.abc import Callable

from diffjax.diffusion.solvers import ancestral, exponential, runge_kutta, stochastic, wrappers
from diffjax.diffusion.solvers.base import Solver

SOLVERS: dict[str, Callable[..., Solver]] = {
    **ancestral.SOLVERS,
    **runge_kutta.SOLVERS,
    **exponential.SOLVERS,
    **stochastic.SOLVERS,
    **wrappers.SOLVERS,
}
