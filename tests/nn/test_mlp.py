from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import randomised

from diffjax.nn.mlp import ACTIVATIONS, Mlp

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "blocks.npz")


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_agree_with_pytorch(name):
    x = GOLDEN["activation/x"]
    own = {"quick_gelu": x / (1.0 + np.exp(-1.702 * x)), "identity": x}  # PyTorch has no function for these
    expected = own[name] if name in own else GOLDEN[f"activation/{name}"]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("gated", "use_bias", "features"), [(False, True, None), (True, True, 5), (True, False, None)]
)
def test_an_mlp_is_its_formula(gated, use_bias, features):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    module = Mlp(6, "silu", gated, use_bias, features)
    params = randomised(module, x)
    assert set(params) == ({"in", "gate", "out"} if gated else {"in", "out"})

    def layer(name, h):
        return h @ np.asarray(params[name]["kernel"], np.float64) + (
            params[name]["bias"] if use_bias else 0.0
        )

    silu = lambda h: h / (1.0 + np.exp(-h))  # noqa: E731
    h = layer("in", np.asarray(x))
    expected = layer("out", silu(layer("gate", np.asarray(x))) * h if gated else silu(h))
    assert expected.shape[-1] == (features or 4)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), expected, atol=1e-6)
    low = jax.jit(module.clone(dtype=jnp.bfloat16).apply)({"params": params}, x)
    assert low.dtype == jnp.bfloat16
    assert 0.0 < np.linalg.norm(low - expected) / np.linalg.norm(expected) < 0.02
