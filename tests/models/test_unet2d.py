from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import num_params, randomised, relative_error

from diffjax.config import stage_config
from diffjax.experiment import build_stage
from diffjax.interop.unet2d import FAMILIES
from diffjax.models.unet2d import UNet2D
from diffjax.models.unet2d_sizes import SIZES
from diffjax.nn.conditioning import NO_LABEL, Cond
from diffjax.nn.layers import axis_rules, logical_axes
from diffjax.parallel.rules import Rules
from diffjax.training.state import count_params

TEXT = UNet2D(
    channels=(4,),
    blocks=(1,),
    attention=("transformer",),
    up_attention=("joint",),
    heads=(2,),
    depth=(2,),
    resample=("conv",),
    middle_blocks=0,
    groups=2,
    text_embed=6,
    classes=3,
    in_channels=5,
    use_mask=True,
)


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = partial(jax.jit, compiler_options=FAST)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


TWO = {
    "channels": (4, 4),
    "blocks": (1, 1),
    "attention": ("", ""),
    "up_attention": (),
    "heads": (1, 1),
    "depth": (),
    "resample": ("conv", "conv"),
}
LEVEL = jnp.asarray([40.0, 900.0])
X = normal(0, 2, 4, 4, 3)
COND = Cond(
    text=normal(1, 2, 3, 6),
    mask=jnp.asarray([[True, True, False], [True, False, False]]),
    low_res=normal(2, 2, 4, 4, 2),
    label=jnp.asarray([2, 0]),
)


@pytest.fixture(scope="module")
def params():
    return randomised(TEXT, X, LEVEL, COND)


@pytest.fixture(scope="module")
def apply(params):
    """The network that all others are compared with, compiled once."""
    run = jit(lambda params, x, cond: TEXT.apply({"params": params}, x, LEVEL, cond))
    return lambda x=X, cond=COND: run(params, x, cond)


def gradients(module):
    params = randomised(module, X, LEVEL, COND)

    def loss(params):
        y = module.apply({"params": params}, X, LEVEL, COND)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_rolled_and_recomputed_networks_are_the_same():
    module = TEXT.clone(up_attention=("",), classes=0)
    (_, expected), of_params = gradients(module)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of_params))
    for change in ({"scan": False}, {"remat": "full"}):
        (_, y), of_same = gradients(module.clone(**change))
        assert relative_error(y, expected) < 1e-6
        pairs = zip(jax.tree.leaves(of_same), jax.tree.leaves(of_params), strict=True)
        assert all(np.abs(a - b).max() < 1e-5 * largest for a, b in pairs)


def test_remat_must_be_known(params):
    with pytest.raises(ValueError, match="remat is 'some'"):
        TEXT.clone(remat="some").apply({"params": params}, X, LEVEL, COND)


def test_bfloat16_is_near(params, apply):
    y = jit(TEXT.clone(dtype=jnp.bfloat16).apply)({"params": params}, X, LEVEL, COND)
    assert y.dtype == jnp.float32
    assert 1e-4 < relative_error(y, apply()) < 0.1


def test_the_low_resolution_image_follows_the_noisy_one(apply):
    joined = jnp.concatenate([X, COND.low_res], axis=-1)
    np.testing.assert_array_equal(apply(joined, COND._replace(low_res=None)), apply())


def test_hidden_words_do_not_matter(apply):
    hidden = COND.text.at[0, 2].set(9.0).at[1, 1:].set(-9.0)
    np.testing.assert_allclose(apply(cond=COND._replace(text=hidden)), apply(), atol=1e-5)
    seen = COND.text.at[0, 1].set(9.0)
    assert relative_error(apply(cond=COND._replace(text=seen))[0], apply()[0]) > 1e-3


def test_no_class_adds_nothing(params):
    run = jit(lambda module, params, cond: module.apply({"params": params}, X, LEVEL, cond), static_argnums=0)
    nothing = run(TEXT, params, COND._replace(label=jnp.asarray([2, NO_LABEL])))
    others = {name: value for name, value in params.items() if name != "label"}
    unconditional = run(TEXT.clone(classes=0), others, COND)
    np.testing.assert_allclose(nothing[1], unconditional[1], atol=1e-5)
    assert relative_error(nothing[0], unconditional[0]) > 1e-3


def test_dropout_draws_only_in_training():
    module = TEXT.clone(attention=("",), up_attention=(), classes=0, dropout=0.5)
    params = randomised(module, X, LEVEL, COND)
    run = jit(
        lambda key: module.apply(
            {"params": params}, X, LEVEL, COND, deterministic=False, rngs={"dropout": key}
        )
    )
    assert relative_error(run(jax.random.key(0)), run(jax.random.key(1))) > 1e-2
    jax.eval_shape(module.apply, {"params": params}, X, LEVEL, COND)  # which would ask for a key


def test_all_axes_have_names():
    module = TEXT.clone(pooling_heads=2, context=4, text_groups=2, guidance_embed=4)
    cond = COND._replace(guidance=LEVEL)
    with axis_rules([(name, None) for name in Rules._fields]):  # of activations
        boxed = jax.eval_shape(module.init, jax.random.key(0), X, LEVEL, cond)["params"]
    axes = jax.tree.leaves(logical_axes(boxed), is_leaf=lambda x: isinstance(x, tuple))
    assert {name for names in axes for name in names} <= {*Rules._fields}


@pytest.mark.parametrize(
    ("change", "x", "cond", "complaint"),
    [
        ({"blocks": (1, 1)}, X, COND, "blocks has 2 entries"),
        ({"depth": ((1, 2),)}, X, COND, "do not fit"),
        ({"attention": ("text",)}, X, COND, "expected some of"),
        ({"text_embed": 0}, X, COND, "needs text_embed"),
        ({"modulation": "film"}, X, COND, "modulation 'film'"),
        ({"heads": (3,)}, X, COND, "not divisible by 3 heads"),
        (TWO, X[:, :3], COND._replace(low_res=COND.low_res[:, :3]), "images of 3x4; .* multiples of 2"),
        ({}, X, COND._replace(low_res=None), "in_channels is 5"),
        ({}, X, COND._replace(text=None), "told cond.text"),
        ({}, X, COND._replace(label=None), "told cond.label"),
        ({"aug_level": True}, X, COND, "told cond.aug_level"),
    ],
)
def test_what_does_not_fit_is_refused(change, x, cond, complaint):
    with pytest.raises(ValueError, match=complaint):
        jax.eval_shape(TEXT.clone(**change).init, jax.random.key(0), x, LEVEL, cond)


# Of the published weights; papers and model cards give those of ADM and IF rounded. The widths of IF-I-M,
# IF-I-L and IF-II-M are not published.
PUBLISHED = {
    "SD-1.5": (859_520_964, 0),
    "SD-2.1": (865_910_724, 0),
    "SDXL": (2_567_463_684, 0),
    "IF-I-M": (400e6, 30e6),
    "IF-I-L": (900e6, 50e6),
    "IF-I-XL": (4_300e6, 50e6),
    "IF-II-M": (450e6, 35e6),
    "IF-II-L": (1_200e6, 50e6),
    "ADM-64": (296e6, 0.5e6),
    "ADM-128": (422e6, 0.5e6),
    "ADM-256": (554e6, 0.5e6),
    "ADM-512": (559e6, 0.5e6),
    "DDPM-CIFAR10": (35_746_307, 0),
}


# What a stage's configuration says besides the size, and the widths of tokens and pooled text.
STAGES = {
    "SD-1.5": ({"resolution": 512, "latent.channels": 4}, 768, 0),
    "SDXL": ({"resolution": 1024, "latent.channels": 4, "conditions": ("text", "size")}, 2048, 1280),
    "IF-I-XL": ({"resolution": 64, "diffusion.vlb_weight": 1e-3}, 4096, 0),
    "IF-II-L": ({"resolution": 256, "low_res.resolution": 64, "diffusion.vlb_weight": 1e-3}, 4096, 0),
    "ADM-64": ({"resolution": 64, "conditions": ("label",), "diffusion.vlb_weight": 1e-3}, 0, 0),
}


@pytest.mark.parametrize("name", STAGES)
def test_published_sizes_as_configurations_of_a_stage(name):
    settings, text_embed, pooled_embed = STAGES[name]
    config = stage_config()
    config.model = {"name": "unet2d", "size": name}
    config.text.length = 77
    config.diffusion.inputs = {"name": "timestep"}
    config.diffusion.schedule = {"name": "ddpm"}
    config.update_from_flattened_dict(settings)
    config.data.resolution = config.resolution
    count, within = PUBLISHED[name]
    shapes = build_stage(config, text_embed=text_embed, pooled_embed=pooled_embed).shapes
    assert abs(count_params(shapes) - count) <= within


@pytest.mark.parametrize("name", [name for name in SIZES if name not in STAGES])
def test_published_sizes(name):
    module = UNet2D(**SIZES[name])
    example = FAMILIES["UNet2DModel"].example(module)
    count, within = PUBLISHED[name]
    assert abs(num_params(module, *example) - count) <= within
