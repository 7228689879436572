import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import randomised, relative_error

from diffjax.nn.rotary import Rotary
from diffjax.nn.transformer import CONDITIONINGS, INITS, Modulation, TransformerBlock, mlp_width

EMBED, HEADS = 8, 2


class Reference:
    """The formulas of a block in NumPy, one example and one head at a time."""

    def __init__(self, block, params):
        self.block = block
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def linear(self, name, x):
        layer = functools.reduce(dict.__getitem__, name.split("/"), self.params)
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    def norm(self, name, x, epsilon, kind=None):
        layer = functools.reduce(
            dict.__getitem__, name.split("/"), self.params | {name: self.params.get(name, {})}
        )
        kind = kind or self.block.norm
        x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * layer.get("scale", 1.0) + layer.get(
            "bias", 0.0
        )

    def attend(self, name, x, context, mask, angles):
        query, key, value = (
            self.linear(f"{name}/{part}", source)
            for part, source in (("query", x), ("key", context), ("value", context))
        )
        width, outs = EMBED // HEADS, []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            q, k = query[:, part], key[:, part]
            if self.block.qk_norm:
                q = self.norm(f"{name}/query_norm", q, 1e-6, self.block.qk_norm)
                k = self.norm(f"{name}/key_norm", k, 1e-6, self.block.qk_norm)
            if angles is not None:
                q, k = ((y.reshape(len(y), -1, 2) @ [1, 1j]) * np.exp(1j * angles) for y in (q, k))
                logits = (q @ k.conj().T).real
            else:
                logits = q @ k.T
            logits = np.where(mask, logits / math.sqrt(width), -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            outs.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
        return self.linear(f"{name}/out", np.concatenate(outs, axis=-1))

    def mlp(self, x):
        h = self.linear("mlp/in", x)
        active = self.linear("mlp/gate", x) if self.block.gated else h
        if self.block.activation == "silu":
            active = active / (1.0 + np.exp(-active))
        else:
            active = active * 0.5 * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (active + 0.044715 * active**3)))
        return self.linear("mlp/out", active * h if self.block.gated else active)

    def __call__(self, x, context, mask, angles, vector):
        kind = self.block.conditioning
        zero, one = np.zeros(EMBED), np.ones(EMBED)
        vectors = [zero, zero, one, zero, zero, one]  # shift, scale, gate; and these of the MLP
        if kind in ("adaln_zero", "adaln"):
            found = self.linear("modulation/dense", vector / (1.0 + np.exp(-vector)))
            where = range(6) if kind == "adaln_zero" else (0, 1, 3, 4)
            for i, part in zip(where, np.split(found, len(where)), strict=True):
                vectors[i] = part
        elif kind == "adaln_single":
            vectors = vector + self.params["modulation"]["table"]
        h = self.norm("norm_attention", x, self.block.norm_eps[0]) * (1 + vectors[1]) + vectors[0]
        x = x + vectors[2] * self.attend("attention", h, h, True, angles)
        if self.block.cross_attention:
            h = x if kind == "adaln_single" else self.norm("norm_cross", x, 1e-6)
            x = x + self.attend("cross_attention", h, context, mask, None)
        h = self.norm("norm_mlp", x, self.block.norm_eps[1]) * (1 + vectors[4]) + vectors[3]
        return x + vectors[5] * self.mlp(h)


CASES = {
    **{name: {"conditioning": name, "cross_attention": True} for name in CONDITIONINGS},
    "plain": {"norm_eps": (0.1, 0.3), "qkv_bias": False},
    "jit": {"norm": "rms", "qk_norm": "rms", "gated": True, "activation": "silu", "mlp_ratio": 8 / 3},
    "layer": {"norm": "layer", "qk_norm": "layer", "conditioning": "in_context"},
}


def inputs(block):
    random = np.random.default_rng(1)
    x, context = random.normal(size=(2, 5, EMBED)), random.normal(size=(2, 3, 6))
    mask = np.array([[True, True, False], [True, True, True]])
    angles = random.normal(size=(5, EMBED // HEADS // 2))
    vector = random.normal(size=(2, 6, EMBED) if block.conditioning == "adaln_single" else (2, 7))
    return x, context, mask, angles, vector


@pytest.mark.parametrize("name", CASES)
def test_follows_its_formulas(name):
    block = TransformerBlock(HEADS, **CASES[name])
    x, context, mask, angles, vector = inputs(block)
    arguments = (
        *(jnp.asarray(array, jnp.float32) for array in (x, context)),
        jnp.asarray(mask),
        Rotary(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
        jnp.asarray(vector, jnp.float32),
    )
    params = randomised(block, *arguments, scale=0.5)
    y = jax.jit(block.apply)({"params": params}, *arguments)
    reference = Reference(block, params)
    expected = [reference(*row, angles, of) for *row, of in zip(x, context, mask, vector, strict=True)]
    assert relative_error(y, expected) < 1e-5
    alone = {key for key in params if key.startswith("norm")}
    affine = block.norm == "rms" or not CONDITIONINGS[block.conditioning]
    assert bool(alone) == affine  # what modulates a layer norm needs no scale besides


@pytest.mark.parametrize("name", ["adaln_zero", "adaln_single"])
def test_a_new_block_with_gates_changes_nothing(name):
    block = TransformerBlock(HEADS, conditioning=name, cross_attention=True, initializer="xavier")
    x, context, mask, _, vector = (jnp.asarray(array) for array in inputs(block))
    vector = vector if name == "adaln_zero" else 0.0 * vector  # which another layer of zeros has made
    y, _ = jax.jit(block.init_with_output)(jax.random.key(0), x, context, mask, None, vector)
    np.testing.assert_array_equal(y, x)


def test_a_modulation_starts_at_zero_and_is_split_in_order():
    module = Modulation(3, 2)
    vector = jnp.ones((1, 4))
    assert all(not part.any() for part in module.init_with_output(jax.random.key(0), vector)[0])
    bias = jnp.arange(6.0)
    params = {"dense": {"kernel": jnp.zeros((4, 6)), "bias": bias}}
    first, second = module.apply({"params": params}, vector)
    assert first.tolist() == [[0.0, 1.0, 2.0]]
    assert second.tolist() == [[3.0, 4.0, 5.0]]


def test_published_initializers():
    key, inits = jax.random.key(0), INITS["xavier"]
    kernel = inits.linear(key, (64, 192), jnp.float32)
    assert float(jnp.abs(kernel).max()) == pytest.approx(math.sqrt(6 / 256), rel=1e-2)
    assert float(kernel.std()) == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    # Each of three layers of 64 features as a part of one of 192.
    assert float(inits.qkv(key, (64, 64), jnp.float32).std()) == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert float(inits.level(key, (64, 64), jnp.float32).std()) == pytest.approx(0.02, rel=0.05)


def test_the_width_of_an_mlp_is_rounded_down_from_the_exact_product():
    assert [mlp_width(embed, 8 / 3) for embed in (3, 768, 1024, 1280)] == [8, 2048, 2730, 3413]
    assert mlp_width(1152, 4.0) == 4608
