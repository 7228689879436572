import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import channels_last, golden_folder, golden_network, num_params, relative_error
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop.dit import FAMILIES
from diffjax.interop.model import open_network, write_network
from diffjax.interop.rows import sources
from diffjax.models.dit import DiT
from diffjax.models.dit_sizes import SIZES
from diffjax.nn.conditioning import NO_LABEL, Cond, null_cond

TENSORS = "diffusion_pytorch_model.safetensors"
CASES = ("dit_shared", "dit_apart", "dit_pixart", "dit_pixart_plain")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return golden_network(tmp_path_factory.mktemp("dit"), request.param, FAMILIES)


def cond_of(arrays):
    cond = Cond(**{name: arrays[name] for name in ("text", "label") if name in arrays})
    if "mask" in arrays:
        cond = cond._replace(mask=arrays["mask"] > 0)
    if "size" in arrays:
        cond = cond._replace(size=np.concatenate([np.full((3, 4), 7.0), arrays["size"]], axis=1))
    return cond


@functools.cache
def compiled(net):
    return jax.jit(lambda params, *inputs: net.apply({"params": params}, *inputs))


def test_predicts_as_the_original(case):
    network, params, arrays = case
    inputs = channels_last(arrays["x"]), arrays["level"], cond_of(arrays)
    y = compiled(network.module)(params, *inputs)
    assert relative_error(y, channels_last(arrays["y"])) < 1e-4


@pytest.mark.parametrize("case", ["dit_shared", "dit_pixart"], indirect=True)
def test_has_the_gradients_of_the_original(case):
    network, params, arrays = case
    level, cond, cotangent = arrays["level"], cond_of(arrays), channels_last(arrays["cotangent"])

    def weighted(params, x):
        return (network.module.apply({"params": params}, x, level, cond) * cotangent).sum()

    of_params, of_x = jax.jit(jax.grad(weighted, argnums=(0, 1)))(params, channels_last(arrays["x"]))
    assert relative_error(of_x, channels_last(arrays["grad_x"])) < 1e-4
    largest = max(np.abs(value).max() for name, value in arrays.items() if name.startswith("grad:"))
    table, compared = sources(network.family.rows(network.module), network.shapes), 0
    for path, source in table.items():
        leaf = functools.reduce(dict.__getitem__, path.split("/"), of_params)
        expected = np.stack([arrays[f"grad:{name}"] for name in source.names()])
        if source.row.equal:
            expected = expected.sum(0, keepdims=True)  # of all the copies that ours stands for
        ours = [source.to_theirs(np.asarray(copy)) for copy in (leaf if source.copies else leaf[None])]
        # The bias of keys has no effect: its gradient is only rounding.
        np.testing.assert_allclose(np.stack(ours), expected, atol=1e-4 * largest, rtol=1e-4, err_msg=path)
        if np.abs(expected).max() > 1e-4 * largest:
            assert relative_error(np.stack(ours), expected) < 1e-4, path
            compared += 1
    assert compared >= len(table) - 2


def test_is_written_as_it_was_read(case, tmp_path):
    network, params, _ = case
    write_network(tmp_path, network.family, network.module, params)
    original, written = load_file(network.folder / TENSORS), load_file(tmp_path / TENSORS)
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor, strict=True)
    assert open_network(tmp_path, FAMILIES).module == network.module
    said, says = (json.loads((folder / "config.json").read_text()) for folder in (network.folder, tmp_path))
    free = {
        "out_channels",
        "interpolation_scale",
        "use_additional_conditions",
    }  # may be left to defaults there
    assert {key: said[key] for key in says if said[key] is not None or key not in free} == {
        key: value for key, value in says.items() if said[key] is not None or key not in free
    }
    assert said.keys() - says.keys() <= {"dropout", "norm_num_groups", "upcast_attention", "attention_type"}


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
    old = open_network(golden_folder(tmp_path, name, "Transformer2DModel"), FAMILIES)
    assert old.module == new.module
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert open_network(tmp_path, FAMILIES).module == new.module


@pytest.mark.parametrize("case", ["dit_shared"], indirect=True)
def test_no_class_is_the_row_after_the_last(case):
    network, params, arrays = case
    inputs = channels_last(arrays["x"]), arrays["level"], Cond(label=np.array([2, 0, NO_LABEL]))
    assert arrays["label"].tolist() == [2, 0, 5]
    y = compiled(network.module)(params, *inputs)
    assert relative_error(y, channels_last(arrays["y"])) < 1e-4


@pytest.mark.parametrize("case", ["dit_pixart"], indirect=True)
def test_dropped_captions_are_not_seen(case):
    network, params, arrays = case
    cond = null_cond(cond_of(arrays))
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
    folder = golden_folder(tmp_path, name)
    config = json.loads((folder / "config.json").read_text()) | setting
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_network(folder, FAMILIES).read()


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
