"""T5 and CLIP as networks: loops, precision, recomputation, meshes and published sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from networks import num_params, randomised, relative_error

from diffjax.nn.placement import axis_rules, logical_axes, unbox
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.text.clip import ClipText
from diffjax.text.t5 import T5Encoder, relative_buckets

NETWORKS = {
    "t5": T5Encoder(vocab=20, embed=16, layers=2, heads=4, head_dim=6, mlp=24, buckets=8, max_distance=12),
    "clip": ClipText(vocab=20, embed=16, layers=2, heads=4, mlp=24, positions=10, projection=8),
}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (4, 10)), jnp.int32)
MASK = jnp.arange(10)[None] < jnp.array([[10], [7], [3], [1]])


@functools.cache
def params(name):
    return randomised(NETWORKS[name], IDS, MASK, scale=0.3)


def states(net, params, ids=IDS, mask=MASK):
    """Token states; of CLIP the penultimate ones and the pooled vectors, in a row."""
    out = net.apply({"params": params}, ids, mask, **({"skip": 1} if isinstance(net, ClipText) else {}))
    return jnp.concatenate([out.states.ravel(), out.pooled.ravel()]) if isinstance(net, ClipText) else out


@functools.cache
def exact(name):
    return jax.jit(lambda params: states(NETWORKS[name], params))(params(name))


def cost_and_gradients(net, params):
    cost = lambda params: jnp.mean(jnp.sin(states(net, params)))  # noqa: E731
    if net.remat:
        assert "remat" in str(jax.make_jaxpr(jax.grad(cost))(params))
    return jax.jit(jax.value_and_grad(cost))(params)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unrolled_loop_and_recomputation_change_nothing(name):
    net = NETWORKS[name]
    cost, gradients = cost_and_gradients(net, params(name))
    other_cost, others = cost_and_gradients(net.clone(scan=False, remat="full"), params(name))
    assert abs(other_cost - cost) < 1e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), others, gradients)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_near_float32(name):
    low = jax.jit(lambda params: states(NETWORKS[name].clone(dtype=jnp.bfloat16), params))(params(name))
    assert low.dtype == jnp.float32
    assert 1e-4 < jnp.linalg.norm(low - exact(name)) / jnp.linalg.norm(exact(name)) < 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_divided_over_a_mesh_it_is_the_same(name):
    net, rules = NETWORKS[name], Rules()
    boxed = jax.eval_shape(net.init, jax.random.key(0), IDS, MASK)["params"]
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    placement = param_shardings(mesh, rules, unbox(boxed), logical_axes(boxed), min_size=1)
    placed = jax.device_put(params(name), placement)
    ids = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec("fsdp")))
    with jax.set_mesh(mesh), axis_rules(rules.pairs()):
        divided = jax.jit(lambda params, ids: states(net, params, ids))(placed, ids)
    assert relative_error(divided, exact(name)) < 1e-5
    here = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed))
    everywhere = sum(leaf.size for leaf in jax.tree.leaves(placed))
    assert here < 0.3 * everywhere


def test_tokens_that_must_not_be_seen_change_nothing():
    for name, net in NETWORKS.items():
        other = jnp.where(MASK, IDS, 7)
        run = jax.jit(functools.partial(net.apply, {"params": params(name)}))
        first, second = (run(ids, MASK) for ids in (IDS, other))
        if name == "clip":
            first, second = first.states, second.states
        np.testing.assert_allclose(second[MASK], first[MASK], atol=1e-5)
    later = run(IDS.at[:, 6:].set(3)).states  # CLIP's tokens see no later ones
    np.testing.assert_allclose(later[:, :6], run(IDS).states[:, :6], atol=1e-5)


def test_which_token_of_clip_ends_a_text():
    ids = jnp.array([[4, 9, 5, 9, 19, 2, 19, 0, 0, 0]])
    net, weights = NETWORKS["clip"].clone(projection=0), dict(params("clip"))
    weights.pop("projection")
    for eos, place in ((2, 4), (9, 1), (0, 7)):  # 2: the highest id, whatever it is
        out = jax.jit(net.clone(eos=eos).apply)({"params": weights}, ids)
        np.testing.assert_allclose(out.pooled[0], out.normed[0, place], atol=1e-5)


def test_all_blocks_of_clip_can_be_left_out():
    net, weights = NETWORKS["clip"], params("clip")
    embedded = weights["tokens"]["embedding"][IDS] + weights["positions"]["embedding"]
    np.testing.assert_allclose(net.apply({"params": weights}, IDS, skip=2).states, embedded, atol=1e-6)
    with pytest.raises(ValueError, match="3 blocks cannot be left out of 2"):
        net.apply({"params": weights}, IDS, skip=3)
    with pytest.raises(ValueError, match="11 tokens, but this CLIP has 10 positions"):
        net.apply({"params": weights}, jnp.zeros((1, 11), jnp.int32))


def test_relative_buckets_have_the_bounds_of_the_paper():
    row = relative_buckets(400, 32, 128)[200]
    assert row[200:209].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]  # one each, up to 8
    assert row[192:201].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    for distance in (9, 30, 70, 127, 150):
        bucket = min(8 + int(8 * math.log(distance / 8) / math.log(16)), 15)
        assert (row[200 - distance], row[200 + distance]) == (bucket, bucket + 16)


T5_V1_0 = {"activation": "relu", "gated": False}
SIZES = {
    # The module, and how many parameters the original classes have.
    "t5-small": (T5Encoder(embed=512, layers=6, heads=8, mlp=2048, **T5_V1_0), 35_330_816),
    "t5-base": (T5Encoder(embed=768, layers=12, heads=12, mlp=3072, **T5_V1_0), 109_628_544),
    "t5-large": (T5Encoder(embed=1024, layers=24, heads=16, mlp=4096, **T5_V1_0), 334_939_648),
    "t5-3b": (T5Encoder(embed=1024, heads=32, head_dim=128, mlp=16384, **T5_V1_0), 1_240_909_824),
    "t5-11b": (T5Encoder(embed=1024, heads=128, head_dim=128, mlp=65536, **T5_V1_0), 4_864_791_552),
    "t5-v1_1-small": (T5Encoder(embed=512, layers=8, heads=6, mlp=1024), 35_332_800),
    "t5-v1_1-base": (T5Encoder(embed=768, layers=12, heads=12, mlp=2048), 109_628_544),
    "t5-v1_1-large": (T5Encoder(embed=1024, heads=16, mlp=2816), 341_231_104),
    "t5-v1_1-xl": (T5Encoder(embed=2048, heads=32, mlp=5120), 1_223_527_424),
    "t5-v1_1-xxl": (T5Encoder(), 4_762_310_656),
    "clip-l": (ClipText(), 123_060_480),
    "openclip-h of Stable Diffusion 2": (
        ClipText(embed=1024, layers=23, heads=16, mlp=4096, activation="gelu"),
        340_387_840,
    ),
    "openclip-bigg": (
        ClipText(embed=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280),
        694_659_840,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(name):
    net, count = SIZES[name]
    assert num_params(net, IDS) == count
