import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import num_params

from diffjax.models.dit import DiT
from diffjax.models.dit_sizes import SIZES
from diffjax.nn.conditioning import Cond, drop_cond, null_cond
from diffjax.nn.layers import logical_axes, unbox
from diffjax.nn.patches import patchify, unpatchify
from diffjax.nn.rotary import rotary
from diffjax.nn.transformer import CONDITIONINGS, TransformerBlock, modulate
from diffjax.parallel.rules import Rules

NET = DiT(patch=2, embed=16, depth=2, heads=2)
SIZE = 8


def batch(size=SIZE, low_res=True):
    """Three examples: full text, part of a text, no text."""
    keys = jax.random.split(jax.random.key(0), 4)
    cond = Cond(
        text=jax.random.normal(keys[0], (3, 4, 5)),
        mask=jnp.array([[True] * 4, [True, True, False, False], [False] * 4]),
        pooled=jax.random.normal(keys[1], (3, 5)),
    )
    if low_res:
        images = jax.random.normal(keys[2], (3, size, size, 3))
        cond = cond._replace(low_res=images, aug_level=jnp.array([2.0, 0.0, -3.0]))
    return jax.random.normal(keys[3], (3, size, size, 3)), jnp.array([3.0, -1.0, 0.5]), cond


def redrawn(net, inputs):
    """Parameters without a zero in them: zero-initialised gates would hide every mistake behind them."""
    shapes = unbox(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(0)

    def draw(path, leaf):
        kernel = path[-1].key in ("kernel", "embedding")
        scale = leaf.shape[-2] ** -0.5 if kernel else 0.2
        return jnp.asarray(random.normal(float(path[-1].key == "scale"), scale, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


INPUTS = batch()
PARAMS = redrawn(NET, INPUTS)
apply = jax.jit(lambda params, *inputs: NET.apply({"params": params}, *inputs))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_is_the_inverse_of_patchify(patch):
    images = jnp.arange(2 * 4 * 8 * 3, dtype=jnp.float32).reshape(2, 4, 8, 3)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, 32 // patch**2, patch * patch * 3)
    np.testing.assert_array_equal(unpatchify(tokens, patch, 4, 8), images)
    np.testing.assert_array_equal(tokens[1, 1], images[1, :patch, patch : 2 * patch].ravel())  # by row


def test_the_output_is_float32_of_the_images_shape():
    out = apply(PARAMS, *INPUTS)
    assert out.shape == (3, SIZE, SIZE, 3)
    assert out.dtype == jnp.float32
    assert 0.05 < float(out.std()) < 50.0  # the comparisons below mean something


def test_a_new_network_predicts_zero():
    last = jax.jit(lambda key: unbox(NET.init(key, *INPUTS)["params"]["patch_out"]))
    new = PARAMS | {"patch_out": last(jax.random.key(0))}
    np.testing.assert_array_equal(apply(new, *INPUTS), jnp.zeros((3, SIZE, SIZE, 3)))


def test_the_output_depends_on_every_input_and_on_no_other_example():
    x, logsnr, cond = INPUTS
    before = apply(PARAMS, x, logsnr, cond)

    def moved(array):
        return array.at[1].add(1.0)

    # A shift of all of a text's features would vanish in a norm, so move one feature.
    variants = {
        "x": (moved(x), logsnr, cond),
        "logsnr": (x, moved(logsnr), cond),
        "text": (x, logsnr, cond._replace(text=cond.text.at[1, 1, 0].add(1.0))),
        "mask": (x, logsnr, cond._replace(mask=cond.mask.at[1, 2].set(True))),
        "pooled": (x, logsnr, cond._replace(pooled=cond.pooled.at[1, 0].add(1.0))),
        "low_res": (x, logsnr, cond._replace(low_res=moved(cond.low_res))),
        "aug_level": (x, logsnr, cond._replace(aug_level=moved(cond.aug_level))),
    }
    for name, inputs in variants.items():
        change = np.abs(apply(PARAMS, *inputs) - before).max(axis=(1, 2, 3))
        assert change[1] > 1e-3, name
        assert change[0] == change[2] == 0.0, name


def test_every_pixel_sees_every_other_and_knows_its_place():
    x, logsnr, cond = INPUTS
    change = np.abs(apply(PARAMS, x.at[0, 0, 0, 0].add(3.0), logsnr, cond) - apply(PARAMS, *INPUTS))[0]
    assert change.max(axis=-1).min() > 1e-5
    constant = cond._replace(low_res=jnp.zeros_like(cond.low_res))
    flat = apply(PARAMS, jnp.zeros_like(x), logsnr, constant)
    assert float(jnp.abs(flat[:, :2, :2] - flat[:, 2:4, 4:6]).max()) > 1e-3


def test_a_masked_token_does_not_matter():
    x, logsnr, cond = INPUTS
    other = cond._replace(text=cond.text.at[1, 2:].set(7.0))
    np.testing.assert_array_equal(apply(PARAMS, x, logsnr, cond), apply(PARAMS, x, logsnr, other))


def test_dropped_text_ignores_text_and_pooled():
    x, logsnr, cond = INPUTS
    dropped = drop_cond(cond, jnp.array([True, False, False]))
    other = dropped._replace(text=dropped.text.at[0].set(7.0), pooled=dropped.pooled.at[0].set(7.0))
    out = apply(PARAMS, x, logsnr, dropped)
    np.testing.assert_array_equal(out, apply(PARAMS, x, logsnr, other))
    assert float(jnp.abs(out - apply(PARAMS, x, logsnr, cond))[0].max()) > 1e-3


def test_gradients_reach_every_parameter():
    weights = jnp.asarray(np.random.default_rng(1).normal(size=INPUTS[0].shape), jnp.float32)
    gradients = jax.jit(jax.grad(lambda params: (weights * apply(params, *INPUTS)).sum()))(PARAMS)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        if name.endswith("['key']['bias']"):
            continue  # one constant added to all logits of a query does not change its softmax
        # Every output of a layer counts: each shift, scale and gate is a slice of one kernel's.
        axes = tuple(range(1, gradient.ndim - 1)) if "blocks" in name else tuple(range(gradient.ndim - 1))
        of_outputs = jnp.abs(gradient).max(axis=axes)
        assert float(of_outputs.min()) > 1e-5, name


def test_the_rolled_loop_and_what_is_kept_change_nothing():
    net = DiT(patch=4, embed=16, depth=2, heads=2, text="")
    inputs = INPUTS[0], INPUTS[1], Cond()
    params, results = redrawn(net, inputs), []
    for other in (net, net.clone(scan=False, remat="full"), net.clone(remat="dots")):
        loss = jax.jit(
            jax.value_and_grad(lambda p, net=other: jnp.mean(net.apply({"params": p}, *inputs) ** 2))
        )
        traced = loss.trace(params)
        assert ("remat" in str(traced.jaxpr)) == bool(other.remat)
        results.append(traced.lower().compile()(params))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results[0][1]))
    for loss, gradients in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-6)
        for one, other in zip(*map(jax.tree.leaves, (gradients, results[0][1])), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * largest)


def test_bfloat16_is_close_to_float32():
    out = apply(PARAMS, *INPUTS)
    low = jax.jit(NET.clone(dtype=jnp.bfloat16).apply)({"params": PARAMS}, *INPUTS)
    assert low.dtype == jnp.float32
    assert 0.0 < float(jnp.linalg.norm(low - out) / jnp.linalg.norm(out)) < 0.05


def test_every_parameter_has_logical_axes_that_the_rules_know():
    boxed = jax.eval_shape(NET.init, jax.random.key(0), *INPUTS)["params"]
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    shapes = jax.tree_util.tree_leaves_with_path(unbox(boxed))
    names = jax.tree.leaves(logical_axes(boxed), is_leaf=is_names)
    for (path, shape), axes in zip(shapes, names, strict=True):
        assert len(axes) == shape.ndim, jax.tree_util.keystr(path)
        assert all(isinstance(axis, str) for axis in axes), jax.tree_util.keystr(path)
        Rules().spec(axes)  # raises at a name without a rule
    assert {leaf.dtype for _, leaf in shapes} == {jnp.dtype("float32")}


def test_without_cross_attention_text_enters_by_the_vector_alone():
    net, (x, logsnr, cond) = NET.clone(cross_attention=False), batch(low_res=False)
    params = redrawn(net, (x, logsnr, cond))
    assert "cross_attention" not in params["blocks"]
    assert "aug_level" not in params
    run = jax.jit(lambda cond: net.apply({"params": params}, x, logsnr, cond))
    out = run(cond)
    np.testing.assert_array_equal(run(cond._replace(text=cond.text + 1.0)), out)
    assert float(jnp.abs(run(cond._replace(pooled=cond.pooled.at[0, 0].add(1.0))) - out)[0].max()) > 1e-3


def test_other_sizes_and_oblong_images_work():
    x, logsnr, cond = batch(low_res=False)
    out, _ = jax.eval_shape(NET.init_with_output, jax.random.key(0), x[:, :4], logsnr, cond)
    assert out.shape == (3, 4, 8, 3)


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="image of 8 x 8 is not divisible into patches of 3"):
        jax.eval_shape(NET.clone(patch=3).init, jax.random.key(0), *INPUTS)
    with pytest.raises(ValueError, match="width 16 is not divisible by 3 heads"):
        jax.eval_shape(NET.clone(heads=3).init, jax.random.key(0), *INPUTS)


# What a network may be told, and of which the options below are told a part.
LABELS = jnp.array([2, 0, -1])
SIZES_IN_PIXELS = jnp.array([[0.0, 0, 0, 0, *size] for size in ((512, 768), (64, 64), (90, 30))])
SMALL = {"patch": 2, "embed": 24, "depth": 2, "heads": 2, "text": "", "classes": 3, "positions": "sincos"}
JIT = {
    "norm": "rms",
    "qk_norm": "rms",
    "activation": "silu",
    "gated": True,
    "positions": "sincos+rotary",
    "bottleneck": 6,
    "class_tokens": 3,
    "class_tokens_from": 1,
}
VARIANTS = {
    **{name: {"conditioning": name} for name in CONDITIONINGS},
    "jit": JIT,
    "registers": {"registers": 3, "positions": "rotary", "qk_norm": "layer"},
    "apart": {"embed_per_block": True},
    "caption": {"text": "caption", "conditioning": "cross_attention", "sizes": True},
    "text": {"text": "pooled", "conditioning": "in_context", "classes": 0},
}


def told(net, cond):
    """Of `cond`, what `net` asks for."""
    if not net.text:
        cond = cond._replace(text=None, mask=None, pooled=None)
    return cond._replace(label=LABELS if net.classes else None, size=SIZES_IN_PIXELS if net.sizes else None)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A network with each option, its parameters, its inputs and its compiled function."""
    net = DiT(**SMALL | VARIANTS[request.param])
    x, level, cond = batch(low_res=False)
    inputs = x, 10.0 * level, told(net, cond)
    return (
        net,
        redrawn(net, inputs),
        inputs,
        jax.jit(lambda params, *given: net.apply({"params": params}, *given)),
    )


def test_every_option_uses_all_that_it_is_told(variant):
    net, params, (x, level, cond), run = variant
    before = run(params, x, level, cond)
    assert before.shape == x.shape
    moved = {"x": (x.at[1].add(1.0), level, cond), "level": (x, level.at[1].add(9.0), cond)}
    if net.text:
        moved["text"] = (x, level, cond._replace(text=cond.text.at[1, 1, 0].add(1.0)))
        dropped = null_cond(cond)
        other = dropped._replace(text=dropped.text + 1.0, pooled=dropped.pooled + 1.0)
        np.testing.assert_array_equal(run(params, x, level, dropped), run(params, x, level, other))
    if net.classes:
        moved["label"] = (x, level, cond._replace(label=cond.label.at[1].set(1)))
    if net.sizes:
        moved["size"] = (x, level, cond._replace(size=cond.size.at[1, 5].set(32.0)))
    for name, inputs in moved.items():
        change = np.abs(run(params, *inputs) - before).max(axis=(1, 2, 3))
        assert change[1] > 1e-4, name
        assert change[0] == change[2] == 0.0, name


@pytest.mark.parametrize("variant", ["jit", "apart"], indirect=True)
def test_options_are_the_same_unrolled_and_near_in_bfloat16(variant):
    net, params, inputs, run = variant
    out = run(params, *inputs)
    unrolled = jax.jit(net.clone(scan=False).apply)({"params": params}, *inputs)
    np.testing.assert_allclose(unrolled, out, atol=1e-6 * float(jnp.abs(out).max()), rtol=1e-6)
    low = jax.jit(net.clone(dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert low.dtype == jnp.float32
    assert 0.0 < float(jnp.linalg.norm(low - out) / jnp.linalg.norm(out)) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_trains(name):
    """The noise of a few pictures of coloured squares is predicted better and better, by every parameter."""
    net = DiT(**SMALL | VARIANTS[name], initializer="xavier")
    _, _, cond = batch(low_res=False)
    cond = told(net, cond)
    random = np.random.default_rng(0)
    pictures = np.kron(random.choice([-1.0, 1.0], size=(3, 2, 2, 3)), np.ones((1, 4, 4, 1)))
    noise = jnp.asarray(random.normal(size=pictures.shape), jnp.float32)
    level = jnp.array([300.0, 600.0, 900.0])
    part = (level / 1000.0)[:, None, None, None]
    x = jnp.asarray(pictures, jnp.float32) * (1.0 - part) + noise * part
    optimizer = optax.adam(5e-3)
    params = jax.jit(lambda key: unbox(net.init(key, x, level, cond)["params"]))(jax.random.key(0))

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(
            lambda p: jnp.mean((net.apply({"params": p}, x, level, cond) - noise) ** 2)
        )(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    new, state, losses = params, optimizer.init(params), []
    for _ in range(30):
        new, state, loss = step(new, state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    for (path, old), moved in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if not name.endswith("['key']['bias']"):  # which no softmax feels
            assert float(jnp.abs(moved - old).max()) > 1e-4, name


def test_jit_is_composed_as_published():
    net = DiT(**SMALL | JIT, level_shift=0.0, time_input="time")
    x, level, cond = batch(low_res=False)
    inputs = x, level, told(net, cond)
    params = redrawn(net, inputs)
    block = TransformerBlock(2, 4.0, "adaln_zero", False, "rms", (1e-6, 1e-6), "rms", True, "silu", True)

    def composed(params, x, level):
        p = params["embedding"]
        angles = level[:, None] * 10_000.0 ** (-jnp.arange(128) / 128)
        h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        for name, act in (("in", jax.nn.silu), ("out", lambda h: h)):
            h = act(h @ p["level"]["mlp"][name]["kernel"] + p["level"]["mlp"][name]["bias"])
        of_label = p["label"]["table"]["embedding"][jnp.array([2, 0, 3])]
        vector = h + of_label

        h = patchify(x, 2) @ params["patch_narrow"]["kernel"] @ params["patch_in"]["kernel"]
        rows, columns = np.divmod(np.arange(16), 4)
        angles = np.stack([columns, rows], 1)[:, :, None] / 10_000.0 ** (np.arange(6) / 6)
        h = (
            h
            + params["patch_in"]["bias"]
            + np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(16, 24)
        )

        place = jnp.asarray(np.stack([rows, columns], -1))
        early, late = (jax.tree.map(lambda p: p[0], params[name]) for name in ("early_blocks", "blocks"))
        h = block.apply({"params": early}, h, None, None, rotary(place, (6, 6)), vector)
        tokens = params["class_positions"] + of_label[:, None]
        place = jnp.concatenate([jnp.zeros((3, 2), int), place])
        h = jnp.concatenate([tokens, h], 1)
        h = block.apply({"params": late}, h, None, None, rotary(place, (6, 6)), vector)[:, 3:]
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
        last = params["final_modulation"]["dense"]
        h = modulate(h, *jnp.split(jax.nn.silu(vector) @ last["kernel"] + last["bias"], 2, -1))
        return unpatchify(h @ params["patch_out"]["kernel"] + params["patch_out"]["bias"], 2, 8, 8)

    expected = jax.jit(composed)(params, x, level)
    out = jax.jit(net.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(out, expected, atol=2e-5 * float(jnp.abs(expected).max()))


PUBLISHED = {  # in millions, as the papers say
    "DiT-S/2": 33,
    "DiT-B/2": 130,
    "DiT-L/2": 458,
    "DiT-XL/2": 675,
    "JiT-B/16": 131,
    "JiT-L/16": 459,
    "JiT-H/16": 953,
    "PixArt-alpha-XL/2-512": 611,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_numbers_of_parameters(name):
    net = DiT(**SIZES[name])
    size = 2 * net.patch
    cond = Cond(label=jnp.zeros(1, int), text=jnp.zeros((1, 2, net.text_embed)))
    count = num_params(net, jnp.zeros((1, size, size, net.in_channels)), jnp.zeros(1), cond)
    assert round(count / 1e6) == PUBLISHED[name]


def test_there_are_all_the_published_sizes():
    names = {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    names |= {f"JiT-{size}/{patch}" for size in ("B", "L", "H") for patch in (16, 32)}
    assert SIZES.keys() == names | {f"PixArt-alpha-XL/2-{pixels}" for pixels in (256, 512, 1024)}
    assert all(DiT(**attributes).embed % (4 * DiT(**attributes).heads) == 0 for attributes in SIZES.values())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"conditioning": "adaln0"}, "conditioning is 'adaln0'; expected 'adaln_zero', 'adaln'"),
        ({"positions": "learned"}, "positions is 'learned'"),
        ({"initializer": "he"}, "initializer is 'he'"),
        ({"positions": "rotary", "heads": 12}, "rotary positions need a multiple of 4"),
        ({"class_tokens": 2, "class_tokens_from": 2}, "class_tokens_from below depth 2"),
        ({"class_tokens": 2, "classes": 0}, "class_tokens need classes"),
        ({"embed_per_block": True, "conditioning": "adaln"}, "embed_per_block goes with"),
        ({"in_channels": 4}, "images have 3 channels; expected 4"),
        ({"text": "tokens", "sizes": True}, r"conditioned on cond\.text and cond\.size"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_attributes_that_contradict_each_other_are_refused(attributes, message):
    net = DiT(**SMALL | attributes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((3, 8, 8, 3)), jnp.zeros(3), Cond(label=LABELS))
