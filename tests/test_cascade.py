import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.cascade import Cascade, TrainedStage, _chain, _compiled, generate, image_keys
from diffjax.diffusion import predictions, thresholding, timesteps, weightings
from diffjax.diffusion.schedules import cosine
from diffjax.diffusion.solvers.ancestral import ddim, ddpm
from diffjax.errors import UserError
from diffjax.models.dit import DiT
from diffjax.nn import transformer
from diffjax.nn.conditioning import Cond
from diffjax.nn.placement import mesh_axes, unbox
from diffjax.stage import SamplerSettings, Stage


def test_stages_are_put_in_order():
    assert _chain({"base": (64, 0)}) == ["base"]
    assert _chain({"large": (256, 64), "base": (16, 0), "middle": (64, 16)}) == ["base", "middle", "large"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"sr": (64, 16)}, r"'sr' \(64 px\) starts from 16 px, but no stage comes before it"),
        ({"a": (16, 0), "sr": (64, 32)}, "'sr' .* starts from 32 px, but a stage of 16 px comes before it"),
        ({"a": (16, 0), "b": (32, 0)}, r"'b' \(32 px\) is a base stage, but a stage of 16 px comes before"),
        ({"a": (16, 0), "b": (64, 16), "c": (64, 16)}, "'c' .* but a stage of 64 px comes before it"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, message):
    with pytest.raises(UserError, match=message):
        _chain(stages)


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_a_key_comes_from_seed_prompt_and_number_alone():
    prompts = ["a cat", "ein Hund — 犬", "a cat", "a lone surrogate \ud800"]
    keys = data(image_keys(7, prompts, [0, 0, 1, 0]))
    assert len(np.unique(keys, axis=0)) == 4
    np.testing.assert_array_equal(data(image_keys(7, prompts[1:2], [0]))[0], keys[1])
    np.testing.assert_array_equal(data(image_keys(7, prompts[::-1], [0, 1, 0, 0])), keys[::-1])
    assert (data(image_keys(8, prompts, [0, 0, 1, 0])) != keys).any(axis=1).all()


def tiny(name, resolution, low_res, solver):
    """A stage whose network was never trained but has no zeros in it."""
    net = DiT(patch=4, embed=8, depth=1, heads=2)
    images = jnp.zeros((1, resolution, resolution, 3))
    cond = Cond(jnp.zeros((1, 3, 5)), jnp.ones((1, 3), bool), jnp.zeros((1, 5)))
    if low_res:
        cond = cond._replace(low_res=images, aug_level=jnp.zeros(1))
    shapes = unbox(jax.eval_shape(net.init, jax.random.key(0), images, jnp.zeros(1), cond)["params"])
    random = np.random.default_rng(resolution)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.0, 0.2, leaf.shape), jnp.float32), shapes)
    stage = Stage(
        net=lambda params, x, level, cond: net.apply({"params": params}, x, level, cond),
        schedule=cosine(),
        prediction=predictions.v,
        target=predictions.v,
        weighting=weightings.unit(),
        times=timesteps.uniform(),
        resolution=resolution,
        low_res=low_res,
    )
    settings = SamplerSettings(solver, 2, 3.0, thresholding.dynamic(), aug_level=0.3 if low_res else 0.0)
    return TrainedStage(name, None, stage, settings, params, 1)


def one_device():
    return jax.make_mesh(
        (1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )


def conds(count, seed=0):
    random = np.random.default_rng(seed)
    text = random.normal(size=(count, 3, 5)).astype(np.float32)
    mask = np.resize([[True] * 3, [True, False, False], [False] * 3, [True, True, False]], (count, 3))
    return Cond(text, mask, text[:, 0])


def test_nothing_is_compiled_again_for_another_seed_prompt_scale_or_number_of_images():
    item = tiny("base", 8, 0, ddpm())

    def run(scale, count, seed):
        settings = dataclasses.replace(item.settings, guidance_scale=scale)
        cascade = Cascade((dataclasses.replace(item, settings=settings),), None, 3, one_device())
        prompts = [f"prompt {seed}"] * count
        keys = image_keys(seed, prompts, range(count))
        return generate(cascade, conds(count, seed), keys, batch_size=2)[0]

    _compiled.cache_clear()
    images = run(3.0, 2, 0)
    program = _compiled(item.stage, dataclasses.replace(item.settings, guidance_scale=0.0))
    assert program._cache_size() == 1
    for scale, count, seed in ((3.0, 2, 1), (7.5, 2, 0), (0.5, 5, 2)):
        other = run(scale, count, seed)
        assert len(other) == count
        assert np.abs(other[:2].astype(int) - images).max() > 0
    assert program._cache_size() == 1
    assert _compiled.cache_info().currsize == 1
    run(1.0, 2, 0)  # off: a program of its own, with one pass a step
    assert _compiled.cache_info().currsize == 2


def test_sampling_runs_on_the_mesh_with_the_rules_for_activations(monkeypatch):
    placed = []

    def constrain(x, *axes):
        placed.append((jax.sharding.get_abstract_mesh().axis_names, mesh_axes(*axes)[0]))
        return x

    cascade = Cascade((tiny("base", 8, 0, ddpm()),), None, 3, one_device())
    monkeypatch.setattr(transformer, "constrain", constrain)
    _compiled.cache_clear()
    generate(cascade, conds(1), image_keys(0, ["prompt"], [0]), batch_size=1)
    _compiled.cache_clear()
    assert set(placed) == {(("data", "fsdp"), ("data", "fsdp"))}


def test_images_are_the_same_in_batches_of_any_size():
    mesh = one_device()
    stages = (tiny("base", 8, 0, ddpm()), tiny("sr", 16, 8, ddim(eta=0.5)))
    cascade = Cascade(stages, encoder=None, text_length=3, mesh=mesh)
    prompts = [f"prompt {i}" for i in range(4)]
    cond = conds(4)
    keys = image_keys(0, prompts, [0] * 4)
    results = {size: generate(cascade, cond, keys, batch_size=size) for size in (4, 3, 1)}
    for images in results.values():
        assert [part.shape for part in images] == [(4, 8, 8, 3), (4, 16, 16, 3)]
        for part, expected in zip(images, results[4], strict=True):
            assert part.dtype == np.uint8
            np.testing.assert_allclose(part.astype(int), expected.astype(int), atol=1)
    for part in results[4]:
        assert part.std() > 10.0
        assert len(np.unique(part.reshape(4, -1), axis=0)) == 4

    # The second stage starts from the images of the first.
    base = dataclasses.replace(stages[0], params=jax.tree.map(lambda leaf: -leaf, stages[0].params))
    swapped = Cascade((base, stages[1]), None, 3, mesh)
    other = generate(swapped, cond, keys, batch_size=4)
    assert np.abs(other[0].astype(int) - results[4][0].astype(int)).max() > 10
    assert np.abs(other[1].astype(int) - results[4][1].astype(int)).max() > 10
