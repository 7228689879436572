import json

import jax
import numpy as np
import pytest
from networks import GOLDEN, channels_last, golden_folder, golden_network, relative_error
from safetensors.numpy import load_file

from diffjax.errors import UserError
from diffjax.interop.model import open_network, write_network
from diffjax.interop.rows import sources, to_tensors
from diffjax.interop.sd3 import FAMILIES
from diffjax.nn.conditioning import Cond
from diffjax.nn.layers import unbox


def run(module, params, arrays, x):
    cond = Cond(text=arrays["text"], pooled=arrays["pooled"])
    return module.apply({"params": params}, x, arrays["level"], cond)


def test_sd3_predicts_what_diffusers_does(tmp_path):
    network, params, arrays = golden_network(tmp_path, "sd3", FAMILIES)
    y = jax.jit(run, static_argnums=0)(network.module, params, arrays, channels_last(arrays["x"]))
    assert relative_error(y, channels_last(arrays["y"])) < 1e-4


def test_sd35_and_its_gradients_are_those_of_diffusers(tmp_path):
    network, params, arrays = golden_network(tmp_path, "sd35", FAMILIES)

    @jax.jit
    def backward(params, x):
        y, pull = jax.vjp(lambda params, x: run(network.module, params, arrays, x), params, x)
        return y, *pull(channels_last(arrays["cotangent"]))

    y, of_params, of_x = backward(params, channels_last(arrays["x"]))
    assert relative_error(y, channels_last(arrays["y"])) < 1e-4
    assert relative_error(of_x, channels_last(arrays["gradient/x"])) < 1e-4
    ours = to_tensors(of_params, sources(network.family.rows(network.module), network.shapes))
    names = [key.removeprefix("gradient/") for key in arrays if key.startswith("gradient/") and "." in key]
    assert len(names) > 4
    for name in names:
        assert relative_error(ours[name], arrays[f"gradient/{name}"]) < 1e-4, name
    assert not np.any(ours["pos_embed.pos_embed"])  # a table that is never learned


def test_a_new_table_of_positions_is_that_of_diffusers(tmp_path):
    network, _, arrays = golden_network(tmp_path, "sd3", FAMILIES)

    @jax.jit
    def fresh(key):
        return unbox(network.module.init(key, *network.family.example(network.module))["params"]["positions"])

    np.testing.assert_allclose(fresh(jax.random.key(0)), arrays["fresh_positions"], atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_what_is_written_is_what_was_read(tmp_path, name):
    network = open_network(golden_folder(tmp_path, name), FAMILIES)
    write_network(tmp_path / "new", network.family, network.module, network.read())
    original = load_file(GOLDEN / f"{name}.safetensors")
    written = load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(written[key].view(np.uint32), tensor.view(np.uint32))
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config
    assert open_network(tmp_path / "new", FAMILIES).module == network.module


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"qk_norm": "l2"}, "qk_norm is 'l2'"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
        ({"pos_embed_max_size": 7}, "pos_embed.pos_embed has shape"),
        ({"caption_projection_dim": 24}, "caption_projection_dim is 24"),
        ({"dual_attention_layers": [4]}, "dual_attention_layers"),
        ({"dual_attention_layers": "all"}, "dual_attention_layers"),
        ({"dual_attention_layers": [0]}, "unexpected: transformer_blocks.1.attn2"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"patch_size": 4}, "mis-shaped"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, complaint):
    config = json.loads((golden_folder(tmp_path, "sd35") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=complaint):
        open_network(tmp_path, FAMILIES).read()
