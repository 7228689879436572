import functools
import json

import jax
import numpy as np
import pytest
from networks import GOLDEN, channels_last, golden_folder, golden_network, relative_error
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop.autoencoder import AUTOENCODER_KL, FAMILIES, decoder_only
from diffjax.interop.model import open_network, write_network
from diffjax.interop.rows import sources
from diffjax.models.autoencoder import tiled_decode, tiled_encode

TENSORS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=("four", "sixteen", "plain"))
def case(request, tmp_path_factory):
    return golden_network(tmp_path_factory.mktemp("vae"), f"autoencoder_{request.param}", FAMILIES)


def test_encodes_and_decodes_with_the_gradients_of_the_original(case):
    network, params, arrays = case
    net = network.module
    golden = {key: channels_last(value) for key, value in arrays.items() if value.ndim == 4}

    def weighted(params, x, z):
        posterior = net.apply({"params": params}, x, method="encode")
        outputs = {**posterior._asdict(), "images": net.apply({"params": params}, z, method="decode")}
        return sum((out * golden[f"cotangent_{key}"]).sum() for key, out in outputs.items()), outputs | {
            "kl": posterior.kl()
        }

    gradients = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (of_params, of_x, of_z), outputs = gradients(params, golden["x"], golden["z"])
    for key, out in outputs.items():
        assert relative_error(out, golden.get(key, arrays[key])) < 1e-4, key
    assert relative_error(of_x, golden["grad_x"]) < 1e-4
    assert relative_error(of_z, golden["grad_z"]) < 1e-4
    table = sources(network.family.rows(net), network.shapes)
    compared = 0
    for path, source in table.items():
        leaf = functools.reduce(dict.__getitem__, path.split("/"), of_params)
        for i, name in enumerate(source.names()):
            if f"grad:{name}" in arrays:
                gradient = source.to_theirs(np.asarray(leaf[i] if source.copies else leaf))
                assert relative_error(gradient, arrays[f"grad:{name}"]) < 1e-4, name
                compared += 1
    assert compared == 5


@pytest.mark.parametrize("case", ["four"], indirect=True)
def test_tiles_are_blended_as_the_original_does(case):
    network, params, arrays = case
    golden = {key: channels_last(value) for key, value in arrays.items() if value.ndim == 4}
    encoded = jax.jit(lambda params, x: tiled_encode(network.module, params, x))(params, golden["wide"])
    assert relative_error(encoded.mean, golden["tiled_mean"]) < 1e-4
    assert relative_error(encoded.logvar, golden["tiled_logvar"]) < 1e-4
    decode = jax.jit(lambda params, z: tiled_decode(network.module, params, z))
    decoded = decode({"decoder": params["decoder"]}, golden["deep"])
    assert relative_error(decoded, golden["tiled_images"]) < 1e-4


def test_is_written_as_it_was_read(case, tmp_path):
    network, params, _ = case
    write_network(tmp_path, AUTOENCODER_KL, network.module, params)
    original, written = load_file(network.folder / TENSORS), load_file(tmp_path / TENSORS)
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor, strict=True)
    assert open_network(tmp_path, FAMILIES).module == network.module
    said, says = (json.loads((folder / "config.json").read_text()) for folder in (network.folder, tmp_path))
    assert {key: said[key] for key in says} == says
    assert said.keys() - says.keys() <= {"force_upcast"}  # which only tells in what precision to compute


def test_the_decoder_is_read_alone(case):
    network, params, _ = case
    alone = decoder_only(network).read()
    assert alone.keys() == {"decoder"}
    for a, b in zip(jax.tree.leaves(alone["decoder"]), jax.tree.leaves(params["decoder"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_names_of_attention_in_old_checkpoints(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    folder = golden_folder(tmp_path, "autoencoder_four")
    new = open_network(folder, FAMILIES).read()
    tensors = {}
    for name, tensor in load_file(GOLDEN / "autoencoder_four.safetensors").items():
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.")
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, folder / TENSORS)
    for a, b in zip(
        jax.tree.leaves(open_network(folder, FAMILIES).read()), jax.tree.leaves(new), strict=True
    ):
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
        ({"shift_factor": float("nan")}, "shift_factor is nan"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std together"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            r"latents_mean is \[.*\]; expected 4 numbers",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 1.0}, "no shift_factor then"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, setting, message):
    folder = golden_folder(tmp_path, "autoencoder_four")
    config = json.loads((folder / "config.json").read_text()) | setting
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_network(folder, FAMILIES)
