"""This library's side of the comparisons: compiled steps, forward passes and samplers of a case's network."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from diffjax.diffusion import grids, schedules
from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.inputs import time_input
from diffjax.diffusion.losses import BatchLoss, denoising_loss
from diffjax.diffusion.predictions import eps
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import logsnr
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.weightings import unit
from diffjax.flops import model_flops
from diffjax.nn.placement import unbox
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.parallel.rules import on_mesh
from diffjax.training.optimizer import adamw
from diffjax.training.state import TrainState, count_params, create_state
from diffjax.training.step import make_train_step

LEARNING_RATE, DECAY, CLIP_NORM = 1e-4, 0.999, 1.0
SCHEDULE, INPUTS = schedules.ddpm(), time_input(scale=999.0)


class Program(NamedTuple):
    """What is timed.

    Attributes:
      run: does it so many times and waits for the result.
      parameters: of the network.
      first_seconds: what the first call took, with tracing and compiling.
      flops: of one call; 0 where nobody counted.
    """

    run: Callable[[int], None]
    parameters: int
    first_seconds: float
    flops: int


def values(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes: normal numbers, zeros as classes, and masks that hide nothing."""
    random = np.random.default_rng(seed)

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.float32:
            return jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, leaf.dtype == bool, leaf.dtype)

    return jax.tree.map(value, shapes)


def train_program(
    case: Case, batch: int, dtype: Any, *, skip_bad: bool = True, **how: Any
) -> tuple[Callable[..., Any], Any, Any]:
    """The update, what makes its state, and the shapes of its batch.

    AdamW, clipping of the gradients and a moving average of the parameters, as in training; `skip_bad`: see
    `make_train_step`.
    """
    module = case.network(dtype=dtype, **how)
    optimizer = adamw(lambda step: LEARNING_RATE, b2=0.999, clip_norm=CLIP_NORM)

    def draw(batch: Any, key: jax.Array, history: None) -> tuple[Any, jax.Array]:
        x0, _, cond = batch
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = jax.random.uniform(time_key, x0.shape[:1], minval=1e-3)
        return (x0, jax.random.normal(noise_key, x0.shape), t, cond), dropout_key

    def loss(params: Any, examples: Any, key: jax.Array) -> BatchLoss:
        x0, noise, t, cond = examples
        losses = denoising_loss(
            lambda x, level: module.apply({"params": params}, x, level, cond)[..., : case.channels],
            SCHEDULE,
            prediction=eps,
            target=eps,
            weighting=unit(),
            x0=x0,
            eps=noise,
            t=t,
            inputs=INPUTS,
        )
        return BatchLoss(losses, losses, t, logsnr(SCHEDULE(t)))

    def init(key: jax.Array) -> TrainState:
        return create_state(unbox(module.init(key, *values(case.inputs(1)))["params"]), optimizer)

    step = make_train_step(
        draw,
        loss,
        optimizer,
        decay=lambda step: jnp.float32(DECAY),
        learning_rate=lambda step: LEARNING_RATE,
        skip_bad=skip_bad,
    )
    return step, init, case.inputs(batch)


def places(count: int) -> tuple[Any, Any]:
    """Where batches lie on so many devices, and where all else."""
    mesh = make_mesh(devices=jax.devices()[:count])
    return batch_sharding(mesh), replicated(mesh)


def train(case: Case, batch: int, dtype: Any, count: int = 1) -> Program:
    """Updates of the whole state, on `count` devices."""
    step, init, shapes = train_program(case, batch, dtype)
    run, parameters = updates(step, init, shapes, count)
    return Program(run, parameters, _timed(run), 3 * _flops(case, batch, dtype))


def updates(step: Any, init: Any, shapes: Any, count: int = 1) -> tuple[Callable[[int], None], int]:
    """A function that makes so many updates on `count` devices, and the number of parameters.

    The arguments are those that `train_program` gives; each call goes on with the state of the one before.
    """
    divided, whole = places(count)
    examples, key = jax.device_put(values(shapes), divided), jax.device_put(jax.random.key(1), whole)
    state = jax.jit(init, out_shardings=whole)(jax.random.key(0))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=whole)

    def run(times: int) -> None:
        nonlocal state
        with on_mesh(whole.mesh):
            for _ in range(times):
                state, _ = compiled(state, examples, key)
            jax.block_until_ready(state)

    return run, count_params(state.params)


def forward(case: Case, batch: int, dtype: Any, count: int = 1) -> Program:
    """The network's output, on `count` devices."""
    divided, whole = places(count)
    module, params = _network(case, dtype, whole)
    examples = jax.device_put(values(case.inputs(batch)), divided)
    compiled = jax.jit(module.apply)

    def run(times: int) -> None:
        with on_mesh(whole.mesh):
            for _ in range(times):
                out = compiled(params, *examples)
            out.block_until_ready()

    return Program(run, count_params(params), _timed(run), _flops(case, batch, dtype))


def sampling(case: Case, batch: int, dtype: Any, num_steps: int, count: int = 1) -> Program:
    """Images by DDIM on `count` devices, from the seeds to numbers on the host."""
    divided, whole = places(count)
    module, params = _network(case, dtype, whole)
    _, _, cond = jax.device_put(values(case.inputs(batch)), divided)
    times = grids.uniform()(SCHEDULE, num_steps)
    shape = (case.side, case.side, case.channels)

    def images(params: Any, keys: jax.Array, cond: Any) -> jax.Array:
        net = lambda x, level: module.apply(params, x, level, cond)[..., : case.channels]  # noqa: E731
        denoise = make_denoiser(net, SCHEDULE, eps, INPUTS)
        return sample(denoise, SCHEDULE, SOLVERS["ddim"](), keys=keys, shape=shape, times=times)

    compiled = jax.jit(images)

    def run(times: int) -> None:
        with on_mesh(whole.mesh):
            for seed in range(times):
                keys = jax.device_put(jax.random.split(jax.random.key(seed), batch), divided)
                np.asarray(compiled(params, keys, cond))

    return Program(run, count_params(params), _timed(run), num_steps * _flops(case, batch, dtype))


def compile_seconds(case: Case, batch: int, dtype: Any, **how: Any) -> tuple[float, float]:
    """What it takes to trace the train step, and then to compile it; nothing is run and no memory needed."""
    step, init, shapes = train_program(case, batch, dtype, **how)
    state = jax.eval_shape(init, jax.random.key(0))
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, shapes, jax.random.key(1))
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def matrix_rate(dtype: Any, *, side: int = 0, rounds: int = 5) -> float:
    """Operations per second of a matrix product on the default device, the best of some rounds."""
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    a, b = values(jax.ShapeDtypeStruct((2, side, side), jnp.float32)).astype(dtype)
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    count, best = (2 if jax.default_backend() == "cpu" else 20), np.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            out = product(a, b)
        out.block_until_ready()
        best = min(best, (time.perf_counter() - start) / count)
    return 2 * side**3 / best


def _network(case: Case, dtype: Any, place: Any) -> tuple[Any, Any]:
    module = case.network(dtype=dtype)
    init = jax.jit(lambda key: unbox(module.init(key, *values(case.inputs(1)))), out_shardings=place)
    return module, init(jax.random.key(0))


def _flops(case: Case, batch: int, dtype: Any) -> int:
    return batch * model_flops(case.network(dtype=dtype), *case.inputs(1)).total


def _timed(run: Callable[[int], None]) -> float:
    start = time.perf_counter()
    run(1)
    return time.perf_counter() - start
