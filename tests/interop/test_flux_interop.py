import json

import jax
import numpy as np
import pytest
from networks import GOLDEN, channels_last, golden_folder, golden_network, relative_error
from safetensors.numpy import load_file

from diffjax.errors import UserError
from diffjax.interop.flux import FAMILIES
from diffjax.interop.model import open_network, write_network
from diffjax.interop.rows import sources, to_tensors
from diffjax.nn.conditioning import Cond


def run(module, params, arrays, x):
    cond = Cond(text=arrays["text"], pooled=arrays["pooled"], guidance=arrays.get("guidance"))
    return module.apply({"params": params}, x, arrays["level"], cond)


def test_flux_schnell_predicts_what_diffusers_does(tmp_path):
    network, params, arrays = golden_network(tmp_path, "flux_schnell", FAMILIES)
    y = jax.jit(run, static_argnums=0)(network.module, params, arrays, channels_last(arrays["x"]))
    assert relative_error(y, channels_last(arrays["y"])) < 1e-4


def test_flux_dev_and_its_gradients_are_those_of_diffusers(tmp_path):
    network, params, arrays = golden_network(tmp_path, "flux_dev", FAMILIES)

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


@pytest.mark.parametrize("name", ["flux_schnell", "flux_dev"])
def test_what_is_written_is_what_was_read(tmp_path, name):
    network = open_network(golden_folder(tmp_path, name), FAMILIES)
    write_network(tmp_path / "new", network.family, network.module, network.read())
    original = load_file(GOLDEN / f"{name}.safetensors")
    written = load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(written[key].view(np.uint32), tensor.view(np.uint32))
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    config["out_channels"] = config["out_channels"] or config["in_channels"]
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config
    assert open_network(tmp_path / "new", FAMILIES).module == network.module


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch_size": 2}, "patch_size is 2"),
        ({"in_channels": 18}, "multiples of 4"),
        ({"out_channels": 6}, "multiples of 4"),
        ({"axes_dims_rope": [2, 4, 4]}, "axes_dims_rope"),
        ({"axes_dims_rope": [3, 5, 4]}, "axes_dims_rope"),
        ({"axes_dims_rope": [12]}, "axes_dims_rope"),
        ({"guidance_embeds": "yes"}, "guidance_embeds is 'yes'"),
        ({"guidance_embeds": False}, "unexpected: time_text_embed.guidance_embedder"),
        ({"num_single_layers": 1}, "unexpected: single_transformer_blocks.1"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, complaint):
    config = json.loads((golden_folder(tmp_path, "flux_dev") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=complaint):
        open_network(tmp_path, FAMILIES).read()
