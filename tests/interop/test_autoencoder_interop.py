import json

import jax
import numpy as np
import pytest
from networks import channels_last, golden_folder, golden_network, relative_error

from diffjax.errors import UserError
from diffjax.interop.autoencoder import FAMILIES, decoder_only
from diffjax.interop.model import open_network
from diffjax.models.autoencoder import tiled_decode, tiled_encode

TENSORS = "diffusion_pytorch_model.safetensors"


def test_tiles_are_blended_as_the_original_does(tmp_path):
    network, params, arrays = golden_network(tmp_path, "autoencoder_four", FAMILIES)
    golden = {key: channels_last(value) for key, value in arrays.items() if value.ndim == 4}
    encode = jax.jit(lambda params, x: tiled_encode(network.module, params, x))
    encoded = encode(params, golden["wide"])
    assert relative_error(encoded.mean, golden["tiled_mean"]) < 1e-4
    assert relative_error(encoded.logvar, golden["tiled_logvar"]) < 1e-4
    decode = jax.jit(lambda params, z: tiled_decode(network.module, params, z))
    decoded = decode({"decoder": params["decoder"]}, golden["deep"])
    assert relative_error(decoded, golden["tiled_images"]) < 1e-4


@pytest.mark.parametrize("name", ["four", "sixteen", "plain"])
def test_the_decoder_is_read_alone(tmp_path, name):
    network, params, _ = golden_network(tmp_path, f"autoencoder_{name}", FAMILIES)
    alone = decoder_only(network).read()
    assert alone.keys() == {"decoder"}
    for a, b in zip(jax.tree.leaves(alone["decoder"]), jax.tree.leaves(params["decoder"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_settings_that_are_absent_are_those_of_the_original(tmp_path):
    folder = golden_folder(tmp_path, "autoencoder_four")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    net = open_network(folder, FAMILIES).module
    assert (net.channels, net.blocks, net.latent_channels, net.groups) == ((64,), 1, 4, 32)
    assert (net.attention, net.project_moments, net.project_latents) == (True, True, True)
    assert (net.scaling_factor, net.shift_factor, net.sample_size) == (0.18215, 0.0, 32)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types is .*AttnDown"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"act_fn": "mish"}, "act_fn is 'mish'"),
        ({"in_channels": 4}, "in_channels is 4"),
        ({"norm_num_groups": 3}, "its sizes make no network"),
        ({"block_out_channels": 8}, "block_out_channels is 8"),
        ({"use_quant_conv": 1}, "use_quant_conv is 1; expected true or false"),
        ({"scaling_factor": "1"}, "scaling_factor is '1'; expected a finite number, not 0"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"shift_factor": float("nan")}, "NaN is no value of JSON"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std together"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            r"latents_mean is \[.*\]; expected 4 numbers",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 1.0}, "no shift_factor then"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        open_network(golden_folder(tmp_path, "autoencoder_four", **setting), FAMILIES).read()
