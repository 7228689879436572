import json

import jax.numpy as jnp
import numpy as np
import pytest
from networks import channels_last, compiled, golden_folder, golden_network, num_params, relative_error
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop.dit import FAMILIES
from diffjax.interop.model import open_network, write_network
from diffjax.models.dit import DiT
from diffjax.models.dit_sizes import SIZES
from diffjax.nn.conditioning import NO_LABEL, Cond, null_cond

TENSORS = "diffusion_pytorch_model.safetensors"
CASES = ("dit_shared", "dit_apart", "dit_pixart", "dit_pixart_plain")


def test_embeddings_are_shared_where_they_are_equal(tmp_path):
    folder = golden_folder(tmp_path, "dit_shared")
    module = open_network(folder, FAMILIES).module
    assert not module.embed_per_block
    tensors = load_file(folder / TENSORS)
    tensors["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"][0, 0] += 1.0
    save_file(tensors, folder / TENSORS)
    assert open_network(folder, FAMILIES).module == module.clone(embed_per_block=True)
    del tensors["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match=r"missing: transformer_blocks\.1\.norm1\.emb\.class_embedder"):
        open_network(folder, FAMILIES).read()


@pytest.mark.parametrize("name", CASES)
def test_the_name_in_old_folders(tmp_path, name):
    (tmp_path / "new").mkdir()
    new = open_network(golden_folder(tmp_path / "new", name), FAMILIES)
    old = open_network(golden_folder(tmp_path, name, _class_name="Transformer2DModel"), FAMILIES)
    assert old.module == new.module
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert open_network(tmp_path, FAMILIES).module == new.module


def test_no_class_is_the_row_after_the_last(tmp_path):
    network, params, arrays = golden_network(tmp_path, "dit_shared", FAMILIES)
    inputs = channels_last(arrays["x"]), arrays["level"], Cond(label=np.array([2, 0, NO_LABEL]))
    assert arrays["label"].tolist() == [2, 0, 5]
    y = compiled(network.module)(params, *inputs)
    assert relative_error(y, channels_last(arrays["y"])) < 1e-4


def test_dropped_captions_are_not_seen(tmp_path):
    network, params, arrays = golden_network(tmp_path, "dit_pixart", FAMILIES)
    size = np.concatenate([np.full((3, 4), 7.0), arrays["size"]], axis=1)
    cond = null_cond(Cond(text=arrays["text"], mask=arrays["mask"] > 0, size=size))
    inputs = channels_last(arrays["x"]), arrays["level"]
    apply = compiled(network.module)
    one = apply(params, *inputs, cond)
    np.testing.assert_array_equal(one, apply(params, *inputs, cond._replace(text=cond.text + 3.0)))
    assert relative_error(one, channels_last(arrays["y"])) > 1e-2


def test_settings_that_are_absent_are_those_of_the_original(tmp_path):
    folder = golden_folder(tmp_path, "dit_shared")
    # The public folders of DiT-XL/2 and PixArt-alpha at 1024 pixels say no more than these need.
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "DiTTransformer2DModel", "out_channels": 8})
    )
    net = open_network(folder, FAMILIES).module
    published = DiT(**SIZES["DiT-XL/2"], base_size=16, norm_eps=(1e-6, 1e-5), level_shift=1.0)
    assert net == published.clone(initializer="lecun")
    said = {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096}
    (folder / "config.json").write_text(json.dumps(said))
    net = open_network(folder, FAMILIES).module
    assert net == DiT(**SIZES["PixArt-alpha-XL/2-1024"] | {"initializer": "lecun"})
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), Cond(text=jnp.zeros((1, 2, 4096)), size=jnp.ones((1, 6)))
    assert num_params(net, *inputs) == 611_349_152


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("dit_shared", {"norm_type": "ada_norm"}, "norm_type is 'ada_norm'"),
        ("dit_shared", {"norm_type": "ada_norm_single"}, "_class_name is 'DiTTransformer2DModel'"),
        ("dit_shared", {"norm_elementwise_affine": True}, "norm_elementwise_affine is True"),
        ("dit_shared", {"activation_fn": "mish"}, "activation_fn is 'mish'"),
        ("dit_shared", {"activation_fn": ["gelu"]}, "activation_fn is"),
        ("dit_shared", {"cross_attention_dim": 8}, "cross_attention_dim is 8"),
        ("dit_shared", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("dit_shared", {"sample_size": 1}, "sample_size is 1; expected at least"),
        ("dit_shared", {"norm_eps": "0"}, "norm_eps is '0'"),
        ("dit_shared", {"dropout": 0.1}, "dropout is 0.1"),
        ("dit_shared", {"num_vector_embeds": 8}, "num_vector_embeds is 8"),
        ("dit_shared", {"attention_head_dim": 7}, "its sizes make no network"),
        ("dit_shared", {"num_layers": 3}, "missing: pos|missing: transformer_blocks.2"),
        ("dit_pixart", {"attention_type": "gated"}, "attention_type is 'gated'"),
        ("dit_pixart", {"cross_attention_dim": None}, "cross_attention_dim is null"),
        ("dit_pixart", {"cross_attention_dim": 20}, "captions are projected to 24"),
        ("dit_pixart", {"interpolation_scale": 0}, "interpolation_scale is 0"),
        ("dit_pixart_plain", {"use_additional_conditions": True}, "divisible by 3"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, name, setting, message):
    with pytest.raises(UserError, match=message):
        open_network(golden_folder(tmp_path, name, **setting), FAMILIES).read()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "base_size is 0"),
        ({"base_size": 16}, "norm_eps|level_shift is 0.0; in a DiTTransformer2DModel"),
        (
            {"base_size": 16, "level_shift": 1.0, "qk_norm": "rms"},
            "qk_norm is 'rms'; in a DiTTransformer2DModel",
        ),
        ({"base_size": 16, "level_shift": 1.0, "registers": 4}, "registers is 4"),
    ],
)
def test_networks_that_diffusers_has_not_are_not_written(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        write_network(tmp_path, FAMILIES["DiTTransformer2DModel"], DiT(**SIZES["DiT-S/2"], **more), {})
    assert not list(tmp_path.iterdir())
