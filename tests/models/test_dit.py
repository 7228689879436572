import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import compiled, randomised
from tiny_networks import COND, DIT, JIT, LOGSNR, NETWORKS, X, told

from diffjax.models.dit import DiT
from diffjax.nn.conditioning import Cond
from diffjax.nn.patches import patchify, unpatchify
from diffjax.nn.rotary import rotary
from diffjax.nn.transformer import TransformerBlock, modulate

TINY = NETWORKS["dit"]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_is_the_inverse_of_patchify(patch):
    images = jnp.arange(2 * 4 * 8 * 3, dtype=jnp.float32).reshape(2, 4, 8, 3)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, 32 // patch**2, patch * patch * 3)
    np.testing.assert_array_equal(unpatchify(tokens, patch, 4, 8), images)
    np.testing.assert_array_equal(tokens[1, 1], images[1, :patch, patch : 2 * patch].ravel())  # by row


def test_every_pixel_sees_every_other_and_knows_its_place():
    x, logsnr, cond = TINY.inputs
    change = np.abs(TINY(x.at[0, 0, 0, 0].add(3.0), logsnr, cond) - TINY())[0]
    assert change.max(axis=-1).min() > 1e-5
    constant = cond._replace(low_res=jnp.zeros_like(cond.low_res))
    flat = TINY(jnp.zeros_like(x), logsnr, constant)
    assert float(jnp.abs(flat[:, :2, :2] - flat[:, 4:6, 2:4]).max()) > 1e-3


def test_without_cross_attention_text_enters_by_the_vector_alone():
    net, (x, logsnr, cond) = TINY.net.clone(cross_attention=False), told(LOGSNR, "text", "mask", "pooled")
    params = randomised(net, x, logsnr, cond)
    assert "cross_attention" not in params["blocks"]
    assert "aug_level" not in params
    run = lambda cond: compiled(net)(params, x, logsnr, cond)  # noqa: E731
    out = run(cond)
    np.testing.assert_array_equal(run(cond._replace(text=cond.text + 1.0)), out)
    assert float(jnp.abs(run(cond._replace(pooled=cond.pooled.at[0, 0].add(1.0))) - out)[0].max()) > 1e-3


def test_other_sizes_and_oblong_images_work():
    _, logsnr, cond = told(LOGSNR, "text", "mask", "pooled")
    x = jnp.zeros((3, 4, 10, 3))
    out, _ = jax.eval_shape(TINY.net.init_with_output, jax.random.key(0), x, logsnr, cond)
    assert out.shape == (3, 4, 10, 3)


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="image of 8 x 4 is not divisible into patches of 3"):
        jax.eval_shape(TINY.net.clone(patch=3).init, jax.random.key(0), *TINY.inputs)
    with pytest.raises(ValueError, match="width 16 is not divisible by 3 heads"):
        jax.eval_shape(TINY.net.clone(heads=3).init, jax.random.key(0), *TINY.inputs)


def test_jit_is_composed_as_published():
    net = DiT(**DIT | JIT | {"depth": 2}, level_shift=0.0, time_input="time")
    x, level, _ = inputs = told(LOGSNR, "label")
    params = randomised(net, *inputs)
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
        rows, columns = np.divmod(np.arange(8), 2)
        angles = np.stack([columns, rows], 1)[:, :, None] / 10_000.0 ** (np.arange(6) / 6)
        h = (
            h
            + params["patch_in"]["bias"]
            + np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(8, 24)
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
        return unpatchify(h @ params["patch_out"]["kernel"] + params["patch_out"]["bias"], 2, 8, 4)

    expected = jax.jit(composed)(params, x, level)
    out = compiled(net)(params, *inputs)
    np.testing.assert_allclose(out, expected, atol=2e-5 * float(jnp.abs(expected).max()))


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
    net = DiT(**DIT | attributes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), X, LOGSNR, Cond(label=COND.label))
