"""Train steps and samplers of configurations without a single array: what `diffjax.plan` compiles."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import stage as stages
from diffjax.experiment import (
    StageModel,
    build_ema,
    build_model,
    build_optimizer,
    build_sampler,
    build_stage,
    build_update,
    check_sampler,
    example_inputs,
)
from diffjax.flops import model_flops
from diffjax.nn.conditioning import Cond
from diffjax.nn.kernels import use_kernel
from diffjax.parallel.mesh import batch_sharding, check_batch, replicated
from diffjax.parallel.rules import Rules, on_mesh, param_shardings
from diffjax.stage import SamplerSettings
from diffjax.text.encoder import Widths, assumed_widths
from diffjax.training.state import TrainState, count_params, create_state, state_shardings
from diffjax.training.step import compile_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that can be compiled, and what is known of it before.

    Attributes:
      name: of the stage, and what is done with it.
      batch: images of one run, over all devices.
      parameters: their number.
      parts: its arguments by kind, trees of `jax.ShapeDtypeStruct` with placements.
      flops: counts those of one run over all devices: of training, those of three forward passes.
      notes: what is assumed, or not counted.
      lower: lowers it for the devices of its mesh.
    """

    name: str
    batch: int
    parameters: int
    parts: dict[str, Any]
    flops: Callable[[], float]
    notes: tuple[str, ...]
    lower: Callable[[], Any]

    def bytes_per_chip(self) -> dict[str, int]:
        """Bytes of the arguments on each device, without the padding of its layouts."""
        return {kind: tree_bytes(tree) for kind, tree in self.parts.items()}


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on each device; what lies in the host's memory is not counted."""
    on_device = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != "pinned_host"]
    sizes = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in on_device)
    return sum(sizes)


def train_program(config: ConfigDict, mesh: Mesh, *, batch: int = 0, name: str = "train") -> Program:
    """The train step of a stage.

    Args:
      config: the stage's configuration.
      mesh: the mesh, of whatever devices.
      batch: in place of `config.batch_size`.
      name: of the stage.

    Raises:
      UserError: the configuration does not fit together, or does not fit the mesh.
    """
    batch = batch or config.batch_size
    accumulate = config.get("accumulate", 1)
    check_batch(batch, mesh, accumulate=accumulate)
    model, widths = _model(config)
    optimizer, learning_rate = build_optimizer(config)
    offload = config.optimizer.get("offload", False)
    state = abstract_state(model, optimizer, mesh, offload=offload)
    step = build_update(model.stage, optimizer, learning_rate, build_ema(config), accumulate=accumulate)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = compile_train_step(step, shardings, batch_sharding(mesh), replicated(mesh))
    examples = train_batch(config, model, widths, batch, mesh)
    key = _key(mesh)
    one = example_inputs(config, model.stage, *widths[:2])
    attention, notes = _kernel(mesh, config.attention)
    notes += [widths.note] if widths.note else []
    if remat := getattr(build_model(config), "remat", ""):
        notes.append(
            f"model.remat={remat!r}: the network is computed up to once more, which FLOPs do not count."
        )
    if config.latent.channels and not config.latent.cache:
        notes.append("the autoencoder that encodes each batch (latent.cache=False) is a program of its own.")
    if offload:
        notes.append("the optimizer's memory lies on the host (optimizer.offload=True).")
    return Program(
        name,
        batch,
        count_params(model.shapes),
        {
            "parameters": state.params,
            "EMA": state.ema_params,
            "optimizer": (state.opt_state, state.history, state.step),
            "batch": (examples, key),
        },
        lambda: 3.0 * batch * model_flops(model.stage.net, model.shapes, *one).total,
        tuple(notes),
        lambda: _lower(update, mesh, attention, state, examples, key),
    )


def sample_program(
    config: ConfigDict, mesh: Mesh, settings: ConfigDict | None = None, *, batch: int, name: str = "sample"
) -> Program:
    """The sampler of a stage: all its steps, from noise to images or latents.

    Args:
      config: the stage's configuration.
      mesh: the mesh.
      settings: of the sampler; None: `config.preview.sampler`.
      batch: images at a time, over all devices.
      name: of the stage.

    Raises:
      UserError: as `train_program`.
    """
    check_batch(batch, mesh)
    model, widths = _model(config)
    stage = model.stage
    sampler = build_sampler(config.preview.sampler if settings is None else settings, f"{name}.sampler")
    check_sampler(stage, sampler, f"{name}.sampler")
    params = _placed(model.shapes, param_shardings(mesh, Rules(), model.shapes, model.axes))
    cond, keys, low_res = _prompts(config, widths, batch, mesh)
    null = cond if cond.text is not None and config.text.null != "learned" else None
    run = functools.partial(_sample, stage, sampler)
    # Counted for one image; an image takes as much in every batch.
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), (cond, keys, low_res)
    )
    one = (*one, one[0] if null is not None else None)
    attention, notes = _kernel(mesh, config.attention)
    notes += [widths.note] if widths.note else []
    if config.latent.channels:
        notes.append("the autoencoder that decodes the latents is a program of its own.")
    return Program(
        name,
        batch,
        count_params(model.shapes),
        {"parameters": params, "batch": (cond, keys, low_res)},
        lambda: float(batch) * model_flops(run, model.shapes, *one).total,
        tuple(notes),
        lambda: _lower(jax.jit(run), mesh, attention, params, cond, keys, low_res, null),
    )


def abstract_state(model: StageModel, optimizer: Any, mesh: Mesh, *, offload: bool = False) -> TrainState:
    """Shapes and placements of a run's state."""
    places = param_shardings(mesh, Rules(), model.shapes, model.axes)
    shapes = jax.eval_shape(lambda params: create_state(params, optimizer, model.history), model.shapes)
    return _placed(shapes, state_shardings(shapes, optimizer, mesh, places, offload=offload))


def train_batch(
    config: ConfigDict, model: StageModel, widths: Widths, batch: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what the loader gives the train step, as `experiment.build_loader` describes it."""
    pixels = config.crop or config.resolution
    shapes: dict[str, Any] = {"image": ((pixels, pixels, 3), jnp.uint8)}
    if config.latent.channels:
        shapes = {"latent": (model.stage.shape(pixels), jnp.float32)}
    if "text" in config.conditions:
        shapes |= {
            "text": ((_length(config), widths.embed), jnp.float16),
            "mask": ((_length(config),), jnp.bool_),
        }
        shapes |= {"pooled": ((widths.pooled,), jnp.float32)}
    if "label" in config.conditions:
        shapes |= {"label": ((), jnp.int32)}
    return {name: _of_batch(batch, shape, dtype, mesh) for name, (shape, dtype) in shapes.items()}


def _prompts(config: ConfigDict, widths: Widths, batch: int, mesh: Mesh) -> tuple[Cond, Any, Any]:
    """Shapes of a sampler's conditions, keys and low-resolution images."""
    of_batch = functools.partial(_of_batch, batch, mesh=mesh)
    cond = Cond()
    if "text" in config.conditions:
        length = _length(config)
        cond = cond._replace(
            text=of_batch((length, widths.embed), jnp.float32),
            mask=of_batch((length,), jnp.bool_),
            pooled=of_batch((widths.pooled,), jnp.float32),
        )
    if "label" in config.conditions:
        cond = cond._replace(label=of_batch((), jnp.int32))
    side = config.low_res.resolution
    low_res = of_batch((side, side, 3), jnp.float32) if side else None
    return cond, of_batch((), jax.random.key(0).dtype), low_res


def _sample(
    stage: Any, settings: SamplerSettings, params: Any, cond: Cond, keys: Any, low_res: Any, null: Any
) -> Any:
    return stages.sample(stage, settings, params, cond, keys, low_res, null=null)


def _model(config: ConfigDict) -> tuple[StageModel, Widths]:
    widths = (
        assumed_widths(config.text.encoder, config.model.name) if "text" in config.conditions else Widths()
    )
    if "text" in config.conditions and not config.text.length:
        config = config.copy_and_resolve_references()
        config.text.length = _length(config)
    return build_stage(config, text_embed=widths.embed, pooled_embed=widths.pooled), widths


def _length(config: ConfigDict) -> int:
    """Tokens of a caption; 0 in a configuration is what its public encoder uses, of which 256 is the most."""
    return config.text.length or 256


def _kernel(mesh: Mesh, attention: str) -> tuple[str, list[str]]:
    """The kernel of attention that can be compiled, and what there is to say of it."""
    if mesh.devices.flat[0].platform != "gpu" or jax.default_backend() == "gpu" or attention == "xla":
        return attention, []
    note = (
        "attention is planned as 'xla', which holds the products of all queries and keys; cuDNN's kernel, "
        "which does not, can be compiled only where there is a GPU."
    )
    return "xla", [note]


def _lower(function: Any, mesh: Mesh, attention: str, *args: Any) -> Any:
    with on_mesh(mesh, attention), use_kernel(attention, platform=mesh.devices.flat[0].platform):
        return function.lower(*args)


def _of_batch(batch: int, shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=batch_sharding(mesh))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(mesh))


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places
    )
