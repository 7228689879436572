"""Couplings: which noise goes with which image of a minibatch.

A coupling is a function `(key, x0, eps) -> (x0, eps)` on `[batch, …]`. It is applied to freshly drawn noise
before a time is drawn. The images stay where they are, so that their conditions stay beside them.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

Coupling = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(key, x0, eps) -> (x0, eps)`."""


def _require_ott() -> None:
    """Say at once, rather than when a step is compiled, that the package is missing."""
    if importlib.util.find_spec("ott") is None:
        raise ImportError("the optimal-transport couplings need ott-jax: run `pip install 'diffjax[ot]'`")


def independent() -> Coupling:
    """Each image with the noise that was drawn for it."""
    return lambda key, x0, eps: (x0, eps)


def given() -> Coupling:
    """Each image with the noise that the data set holds for it (reflow; Liu et al., 2023).

    The pairs are (image, noise that a trained model made it from); to couple them is to leave them together.
    """
    return lambda key, x0, eps: (x0, eps)


def exact() -> Coupling:
    """The permutation of the noise with the least total squared distance (minibatch OT; Tong et al., 2024).

    The Hungarian algorithm, on the device: its work grows with the cube of the batch. It couples whatever it
    is given: for a batch that is split over devices, the whole batch.
    """
    _require_ott()

    def couple(key: jax.Array, x0: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array]:
        from ott.geometry import geometry
        from ott.tools import unreg

        _, matching = unreg.hungarian(geometry.Geometry(cost_matrix=squared_distances(x0, eps)))
        images, partners = matching.paired_indices
        return x0, eps[jnp.zeros_like(partners).at[images].set(partners)]

    return couple


def sinkhorn(
    *, epsilon: float = 0.05, relative: bool = True, max_iterations: int = 2000, threshold: float = 1e-3
) -> Coupling:
    """A partner for each image, drawn from its row of the entropic transport plan (Tong et al., 2024).

    The plan minimises `sum_ij P_ij |x0_i - eps_j|^2 + epsilon sum_ij P_ij log P_ij`. Some noise may be drawn
    for two images and some for none; on average over the draws, each has its equal share.

    Args:
      epsilon: how blurred the plan is: at 0 the exact one, at infinity the independent one. The Schrodinger
        bridge whose reference process has the diffusion sigma has `2 sigma^2`, not relative.
      relative: whether epsilon is a fraction of the mean squared distance in the batch.
      max_iterations: at most so many Sinkhorn iterations.
      threshold: how far the plan's marginals may be off in total (their L1 distance).
    """
    if not epsilon > 0.0:
        raise ValueError(f"epsilon is {epsilon}; expected more than 0")
    _require_ott()

    def couple(key: jax.Array, x0: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array]:
        from ott.geometry import geometry
        from ott.solvers import linear

        cost = squared_distances(x0, eps)
        blur = epsilon * (jnp.mean(cost) if relative else 1.0)
        plan = linear.solve(
            geometry.Geometry(cost_matrix=cost, epsilon=blur),
            max_iterations=max_iterations,
            threshold=threshold,
        )
        # The logarithm of the plan, up to a constant of each row: the plan itself may underflow.
        return x0, eps[jax.random.categorical(key, (plan.g - cost) / blur, axis=1)]

    return couple


COUPLINGS: dict[str, Callable[..., Coupling]] = {
    "independent": independent,
    "given": given,
    "exact": exact,
    "sinkhorn": sinkhorn,
}


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """`|x_i - y_j|^2` between the examples of two batches, `[batch of x, batch of y]`, in float32."""
    x, y = (part.reshape(part.shape[0], -1).astype(jnp.float32) for part in (x, y))
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1) - 2.0 * products, 0.0)
