import contextlib
import io
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.evaluation import statistics
from diffjax.evaluation.statistics import Moments, Statistics, load_statistics, save_statistics

FEATURES = np.random.default_rng(0).normal(size=(64, 6)) @ np.random.default_rng(1).normal(size=(6, 6)) + 2.0


def equals_one_pass(moments, features=FEATURES):
    assert moments.count == len(features)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(features, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("ends", [[], [1], [1, 2, 40], [0, 10, 10, 63], range(1, 64)])
def test_parts_are_one_pass(ends):
    moments = Moments(6)
    for part in np.split(FEATURES, list(ends)):
        moments.add(part)
    equals_one_pass(moments)


def test_eight_devices_are_one_pass():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    images = np.random.default_rng(2).integers(0, 256, (64, 4, 4, 3)).astype(np.uint8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    seen = jax.jit(lambda x: x.astype(jnp.float32).mean(axis=(1, 2)), out_shardings=place)
    features = seen(jax.device_put(images, place))
    moments, empty = Moments(3), Moments(3)
    for shard in features.addressable_shards:
        moments.merge(Moments(3).add(np.asarray(shard.data)))
    assert len(features.addressable_shards) == 8
    equals_one_pass(moments.merge(empty), np.asarray(features, np.float64))
    equals_one_pass(empty.merge(moments), np.asarray(features, np.float64))


def test_a_large_mean_loses_no_digits():
    """The sum of raw products, less the product of sums, would keep none of them."""
    moments = Moments(6)
    for part in np.split(FEATURES + 1e8, 8):
        moments.add(part)
    np.testing.assert_allclose(moments.cov, np.cov(FEATURES, rowvar=False), rtol=1e-6)


def test_processes_exchange_all_digits(monkeypatch):
    parts = [Moments(6).add(part) for part in np.split(FEATURES, [5, 30])]

    def allgather(words):
        """What JAX does by itself: without x64, 64 bits do not come through."""
        assert jnp.asarray(words).dtype == words.dtype
        others = [np.concatenate([[float(p.count)], p.mean, p._scatter.ravel()]) for p in parts[1:]]
        return np.stack([words, *(other.view(words.dtype) for other in others)])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(statistics.multihost_utils, "process_allgather", allgather)
    equals_one_pass(parts[0].over_hosts())


def test_one_process_has_all():
    equals_one_pass(Moments(6).add(FEATURES).over_hosts())


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\); expected \[n, 6\]"):
        Moments(6).add(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="widths are 6 and 5"):
        Moments(6).merge(Moments(5))
    assert np.isnan(Moments(2).add(np.zeros((1, 2))).cov).all()


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "reference.npz"
    moments = Moments(6).add(FEATURES)
    save_statistics(path, moments, "EfficientNet-Lite0")
    found = load_statistics(path)
    np.testing.assert_array_equal(found.mean, moments.mean)
    np.testing.assert_allclose(found.cov, moments.cov, rtol=1e-15)
    assert (found.count, found.network) == (64, "EfficientNet-Lite0")
    assert os.listdir(path.parent) == ["reference.npz"]
    with np.load(path) as arrays:  # as pytorch-fid and EDM read it
        np.testing.assert_array_equal(arrays["mu"], moments.mean)
        np.testing.assert_array_equal(arrays["sigma"], moments.cov)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_files_of_other_programs(tmp_path, save, dtype):
    """guided-diffusion's hold pictures and other statistics besides; Fortran's order is NumPy's choice."""
    mean, cov = FEATURES.mean(axis=0).astype(dtype), np.cov(FEATURES, rowvar=False).astype(dtype)
    others = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    save(tmp_path / "other.npz", mu=mean, sigma=np.asfortranarray(cov), **others)
    found = load_statistics(tmp_path / "other.npz")
    assert found.mean.dtype == found.cov.dtype == np.float64
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_allclose(found.cov, cov, rtol=1e-6)
    assert (found.count, found.network) == (0, "")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("none.npz", "pipe.npz", "."):
        with pytest.raises(UserError, match=r"is no file; expected an .npz of mu"):
            load_statistics(tmp_path / name)


EYE = np.eye(3)
SPOILT = {
    "mu is missing": ({"sigma": EYE}, "cannot be read"),
    "objects": ({"mu": np.array([None] * 3), "sigma": EYE}, "cannot be read"),
    "other widths": ({"mu": np.zeros(2), "sigma": EYE}, "cannot be read"),
    "smaller": ({"mu": np.zeros(4), "sigma": EYE}, r"mu is \(4,\), sigma \(3, 3\)"),
    "a column": ({"mu": np.zeros((3, 1)), "sigma": EYE}, "cannot be read|mu is"),
    "no features": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is \(0,\)"),
    "whole numbers": ({"mu": np.zeros(3, int), "sigma": EYE}, "not all finite numbers"),
    "infinity": ({"mu": np.full(3, np.inf), "sigma": EYE}, "not all finite numbers"),
    "NaN": ({"mu": np.zeros(3), "sigma": EYE * np.nan}, "not all finite numbers"),
    "not symmetric": ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "sigma is not symmetric"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files_are_refused(tmp_path, case):
    arrays, message = SPOILT[case]
    if case == "other widths":
        arrays = arrays | {"sigma": np.eye(200)}
    np.savez(tmp_path / "spoilt.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_statistics(tmp_path / "spoilt.npz")


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + bytes(24))
        archive.writestr("sigma.npy", b"")
    with pytest.raises(UserError, match="mu is not what its header says"):
        load_statistics(tmp_path / "large.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bytes(10**6))
    with pytest.raises(UserError, match="mu has 1000000 bytes"):
        load_statistics(tmp_path / "bomb.npz")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "damaged.npz"
    save_statistics(path, Statistics(np.zeros(3), EYE))
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip", whole[:-30], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            load_statistics(path)
    np.savez_compressed(path, mu=np.zeros(3), sigma=EYE)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):  # wherever a byte is flipped, it is read or refused
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            load_statistics(path)


def test_a_place_that_cannot_be_written_is_an_error_for_people(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_statistics(tmp_path / "taken" / "reference.npz", Moments(6).add(FEATURES))
