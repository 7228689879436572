"""How many floating-point operations a network takes, counted in its program; nothing is compiled.

Only matrix products and convolutions count, a multiply-add as two operations, as is usual; published numbers
in "GFLOPs" are often multiply-adds, half of this. What compilers report differs: they leave out what falls on
padding, add activations and norms, and count the body of a loop once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from diffjax.nn.kernels import use_kernel


class Flops(NamedTuple):
    """Floating-point operations by kind; those of the backward pass are about twice as many again."""

    matmul: int = 0
    conv: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.matmul + self.conv

    @property
    def multiply_adds(self) -> int:
        """What papers on networks often call FLOPs."""
        return self.total // 2


def stage_flops(config: ConfigDict, *, text_embed: int = 0, pooled_embed: int = 0) -> Flops:
    """Those of one evaluation of a stage's network for one image; arguments as of `build_stage`."""
    from diffjax.experiment import build_stage, example_inputs  # of which counting itself needs nothing

    built = build_stage(config, text_embed=text_embed, pooled_embed=pooled_embed)
    examples = example_inputs(config, built.stage, text_embed, pooled_embed or text_embed)
    return model_flops(built.stage.net, built.shapes, *examples)


def model_flops(model: Any, *examples: Any, **settings: Any) -> Flops:
    """Those of a forward pass.

    Attention counts as what it is, two matrix products, whatever kernel would compute it.

    Args:
      model: a Linen module, or any function of arrays.
      *examples: its arguments, trees of arrays or of `jax.ShapeDtypeStruct`.
      **settings: its other arguments, which are no arrays.

    Raises:
      ValueError: a loop whose length is not known beforehand multiplies matrices.
    """
    with use_kernel("xla"):
        function: Callable[..., Any] = model
        if hasattr(model, "init_with_output"):
            shapes = jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args, **settings), *examples)
            function, examples = model.apply, (shapes, *examples)
        program = jax.make_jaxpr(lambda *args: function(*args, **settings))(*examples)
    return _count(program.jaxpr)


def _count(program: Jaxpr) -> Flops:
    matmul, conv = 0, 0
    for equation in program.eqns:
        found = _operations(equation)
        matmul, conv = matmul + found.matmul, conv + found.conv
    return Flops(matmul, conv)


def _operations(equation: Any) -> Flops:
    """Those of one equation, and of the programs within it."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return Flops(matmul=2 * equation.outvars[0].aval.size * summed)
    if name == "conv_general_dilated":
        _, inputs, *window = params["dimension_numbers"].rhs_spec
        kernel = equation.invars[1].aval.shape  # its inputs are those of one group
        taps = kernel[inputs] * math.prod(kernel[axis] for axis in window)
        zeros = math.prod(params["lhs_dilation"])  # share of the taps that fall between the pixels
        return Flops(conv=2 * equation.outvars[0].aval.size * taps // zeros)

    counts = [_count(program) for program in _programs(params)]
    if not counts:
        return Flops()
    if name == "cond":
        return max(counts, key=lambda flops: flops.total)
    if name == "while" and any(flops.total for flops in counts):
        raise ValueError("a while loop multiplies matrices, and how often it runs is not known beforehand")
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    elif name == "shard_map":
        (axes,) = (value for key, value in params.items() if key.endswith("manual_axes"))
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    return Flops(*(times * sum(kind) for kind in zip(*counts, strict=True)))


def _programs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    is_program = lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)  # noqa: E731
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=is_program):
        if is_program(leaf):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf
