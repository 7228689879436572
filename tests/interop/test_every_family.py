"""What every public network must hold; a new case of golden/ joins by a row of `CASES`."""

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import GOLDEN, channels_last, golden_folder, relative_error
from safetensors.numpy import load_file, save_file

from diffjax.errors import UserError
from diffjax.interop import autoencoder, clip, dit, flux, sd3, t5, unet2d
from diffjax.interop.families import Family
from diffjax.interop.model import open_network, write_network
from diffjax.interop.rows import sources, to_tensors
from diffjax.nn.conditioning import Cond

FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


def denoise(apply, arrays, x):
    cond = {name: arrays[name] for name in Cond._fields if name in arrays}
    if "mask" in cond:
        cond["mask"] = cond["mask"] > 0
    if "size" in cond:  # PixArt is told the size of the picture alone
        cond["size"] = np.pad(cond["size"], ((0, 0), (6 - cond["size"].shape[1], 0)), constant_values=7.0)
    return {"y": apply(x, arrays["level"], Cond(**cond))}


def autoencode(apply, arrays, x, z):
    posterior = apply(x, method="encode")
    return {**posterior._asdict(), "kl": posterior.kl(), "images": apply(z, method="decode")}


def encode_t5(apply, arrays):
    return {"states": apply(arrays["ids"], arrays["mask"]), "unmasked": apply(arrays["ids"])}


def encode_clip(apply, arrays):
    last, penultimate = apply(arrays["ids"]), apply(arrays["ids"], skip=1)
    return {"penultimate": penultimate.states, "last": last.normed, "pooled": penultimate.pooled}


class Case(NamedTuple):
    """A network that the original library wrote.

    Attributes:
      families: of which it is one.
      run: `(apply, arrays, **inputs) -> outputs`, each by its name among the case's arrays.
      gradients: of how many tensors there are gradients.
      unsaid: settings of the original that are not written.
      free: settings that the original leaves to a default and that may be written.
      prefix: of the names that are written, where the original has none.
    """

    families: Mapping[str, Family]
    run: Callable = denoise
    gradients: int = 0
    unsaid: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    prefix: str = ""


DIT = {
    "unsaid": ("dropout", "norm_num_groups", "upcast_attention", "attention_type"),
    "free": ("out_channels", "interpolation_scale", "use_additional_conditions"),
}
VAE = Case(autoencoder.FAMILIES, autoencode, 5, unsaid=("force_upcast",))
CASES = {
    "dit_shared": Case(dit.FAMILIES, gradients=44, **DIT),
    "dit_apart": Case(dit.FAMILIES, **DIT),
    "dit_pixart": Case(dit.FAMILIES, gradients=64, **DIT),
    "dit_pixart_plain": Case(dit.FAMILIES, **DIT),
    "sd3": Case(sd3.FAMILIES),
    "sd35": Case(sd3.FAMILIES, gradients=7),
    "flux_schnell": Case(flux.FAMILIES, free=("out_channels",)),
    "flux_dev": Case(flux.FAMILIES, gradients=6),
    **{f"unet2d_{name}": Case(unet2d.FAMILIES) for name in ("sdxl", "if_first", "ddpm")},
    "unet2d_sd": Case(unet2d.FAMILIES, gradients=8),
    "unet2d_if_second": Case(unet2d.FAMILIES, gradients=7),
    "unet2d_adm": Case(unet2d.FAMILIES, gradients=6),
    **{f"autoencoder_{name}": VAE for name in ("four", "sixteen", "plain")},
    "text/clip_l": Case(clip.FAMILIES, encode_clip, prefix="text_model."),
    "text/clip_lp": Case(clip.FAMILIES, encode_clip),
    "text/clip_g": Case(clip.FAMILIES, encode_clip, gradients=3),
    "text/t5": Case(t5.FAMILIES, encode_t5, gradients=3),
    "text/t5_relu": Case(t5.FAMILIES, encode_t5),
}


def read_arrays(name):
    """The arrays of a case: images with channels last, gradients as `grad:NAME`."""
    if name.startswith("text/"):
        prefix = name.removeprefix("text/") + "/"
        arrays = np.load(GOLDEN / "text" / "models.npz")
        arrays = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
    else:
        arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    arrays = {re.sub("^(gradient/|grad_)", "grad:", key): value for key, value in arrays.items()}
    tensor = re.compile(r"grad:.*\.")
    return {k: v if v.ndim != 4 or tensor.match(k) else channels_last(v) for k, v in arrays.items()}


def folder_of(name, tmp_path):
    return GOLDEN / name if name.startswith("text/") else golden_folder(tmp_path, name)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """The name of a case, its row, its network and its parameters."""
    row = CASES[request.param]
    network = open_network(folder_of(request.param, tmp_path_factory.mktemp("case")), row.families)
    return request.param, row, network, network.read()


def test_outputs_and_gradients_are_those_of_the_original(case):
    name, row, network, params = case
    arrays = read_arrays(name)
    inputs = {key: arrays[key] for key in ("x", "z") if key in arrays}
    cotangents = {
        key.removeprefix("cotangent_"): value for key, value in arrays.items() if "cotangent" in key
    }
    expected = {k.removeprefix("grad:"): v for k, v in arrays.items() if k.startswith("grad:") and "." in k}
    table = sources(network.family.rows(network.module), network.shapes)
    # Only by these parameters, because compiling takes most of the time.
    table = {path: source for path, source in table.items() if expected.keys() & {*source.names()}}
    flat = flatten_dict(params, sep="/")

    def weighted(some, inputs, flat):
        def apply(*args, **settings):
            return network.module.apply({"params": unflatten_dict(flat | some, sep="/")}, *args, **settings)

        out = row.run(apply, arrays, **inputs)
        first = next(iter(out))
        pairs = [(out[first if key == "cotangent" else key], value) for key, value in cotangents.items()]
        return sum(((y * value).sum() for y, value in pairs), jnp.zeros(())), out

    gradients = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    (of_params, of_inputs), out = gradients({path: flat[path] for path in table}, inputs, flat)
    for key, value in out.items():
        if key in arrays:
            assert relative_error(value, arrays[key]) < 1e-4, key
    assert arrays.keys() & out.keys()
    assert len(expected) == row.gradients
    if not expected:
        return
    for key, gradient in of_inputs.items():
        assert relative_error(gradient, arrays[f"grad:{key}"]) < 1e-4, key
    for source in table.values():
        if source.row.equal:  # ours stands for all these copies
            total = sum(expected[tensor] for tensor in source.names())
            expected |= dict.fromkeys(source.names(), total)
    ours = to_tensors(unflatten_dict(of_params, sep="/"), table)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for tensor, gradient in expected.items():
        if tensor.endswith("to_k.bias") and np.abs(gradient).max() < 1e-4 * largest:
            assert np.abs(ours[tensor]).max() < 1e-4 * largest, tensor  # it has no effect: this is rounding
        else:
            assert relative_error(ours[tensor], gradient) < 1e-4, tensor


def test_what_is_written_is_what_was_read(case, tmp_path):
    _, row, network, params = case
    write_network(tmp_path, network.family, network.module, params)
    file = FILES[network.family.library]
    original, written = load_file(network.folder / file), load_file(tmp_path / file)
    original = {row.prefix + key: tensor for key, tensor in original.items()}
    assert original.keys() == written.keys()
    for key, tensor in original.items():
        assert (written[key].shape, written[key].dtype) == (tensor.shape, tensor.dtype), key
        assert written[key].tobytes() == tensor.tobytes(), key
    assert open_network(tmp_path, row.families).module == network.module

    said, says = (json.loads((folder / "config.json").read_text()) for folder in (network.folder, tmp_path))
    levels = len(said.get("block_out_channels", ()))
    for key, value in says.items():
        if key in said and not (said[key] is None and key in row.free):
            assert said[key] in (value, [value] * levels), (
                key
            )  # what was said for each level may be said once
    if network.family.library == "diffusers":
        assert said.keys() - says.keys() <= {*row.unsaid}
    if row.families is not unet2d.FAMILIES:
        assert says.keys() <= said.keys()


@pytest.mark.parametrize("name", CASES)
def test_tensors_that_are_missing_unexpected_or_mis_shaped_are_listed(name, tmp_path):
    row, folder = CASES[name], folder_of(name, tmp_path)
    file = FILES["transformers" if name.startswith("text/") else "diffusers"]
    tensors = load_file(folder / file)
    gone, bent = sorted(key for key in tensors if key.endswith("bias") or "layer_norm" in key)[:2]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    del tensors[gone]
    changed = {bent: np.zeros((3, 5), np.float32), "not.there": np.zeros(3, np.float32)}
    save_file(tensors | changed, tmp_path / file)
    with pytest.raises(UserError) as raised:
        open_network(tmp_path, row.families).read()
    gone, bent = row.prefix + gone, row.prefix + bent
    for complaint in (
        f"missing: {gone}\n",
        "unexpected: not.there\n",
        f"mis-shaped: {bent} has shape (3, 5)",
    ):
        assert complaint in str(raised.value)


@pytest.mark.parametrize("name", ["autoencoder_four", "unet2d_ddpm"])
def test_old_names_of_attention_are_understood(name, tmp_path):
    network = open_network(golden_folder(tmp_path, name), CASES[name].families)
    tensors, params = load_file(tmp_path / FILES["diffusers"]), network.read()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, then in old.items():
        tensors = {key.replace(f".{now}.", f".{then}."): tensor for key, tensor in tensors.items()}
    assert sum("proj_attn.bias" in key for key in tensors) > 1
    save_file(tensors, tmp_path / FILES["diffusers"])
    again = open_network(tmp_path, CASES[name].families).read()
    jax.tree.map(np.testing.assert_array_equal, again, params)
