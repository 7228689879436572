import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffjax.data import latent_cache
from diffjax.data.latent_cache import LatentCache, RandomView
from diffjax.errors import UserError

COUNT = 10
SHAPE = (2, 2, 4, 4, 3)
MOMENTS = np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float16)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 4)


def opened(folder):
    return LatentCache(folder, count=COUNT, shape=SHAPE)


@pytest.fixture
def folder(tmp_path):
    cache = opened(tmp_path / "cache")
    for shard in range(cache.num_shards):
        cache.write(shard, MOMENTS[list(cache.places(shard))])
    return cache.folder


def test_round_trip_of_shards_that_are_not_all_full(folder):
    cache = opened(folder)
    assert (cache.num_shards, len(cache)) == (3, COUNT)
    assert [list(cache.places(shard)) for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(list(folder.iterdir())) == 3
    assert all(cache.open(shard) for shard in range(3))
    for i in reversed(range(COUNT)):
        assert cache[i].dtype == np.float16
        np.testing.assert_array_equal(cache[i], MOMENTS[i])
    element = cache.add({"index": np.int32(7), "label": 3})
    assert element.keys() == {"index", "label", "moments"}
    np.testing.assert_array_equal(element["moments"], MOMENTS[7])


def test_many_threads_read_at_once(folder):
    cache = opened(folder)
    assert all(cache.open(shard) for shard in range(3))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(cache.__getitem__, [i % COUNT for i in range(400)]))
    np.testing.assert_array_equal(read, np.tile(MOMENTS, (40, *[1] * len(SHAPE))))


def test_what_moments_take_on_disk(tmp_path):
    cache = LatentCache(tmp_path, count=100, shape=(2, 64, 64, 4))
    cache.write(0, np.zeros((4, *cache.shape), np.float16))
    # An ArrayRecord file has 64 KiB before its records and after them.
    assert cache.path(0).stat().st_size - 2**17 == pytest.approx(cache.num_bytes(4), rel=0.01)


def damage_away(path):
    path.unlink()


def damage_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_index(path):
    data = bytearray(path.read_bytes())
    data[-65536] ^= 0xFF  # where ArrayRecord keeps its own index
    path.write_bytes(data)


def damage_empty(path):
    path.write_bytes(b"")


def damage_first(path):
    data = bytearray(path.read_bytes())
    data[data.index(MOMENTS[4].tobytes()) + 5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_away, damage_half, damage_index, damage_empty, damage_first])
def test_a_damaged_shard_is_noticed_when_opened_and_can_be_written_anew(folder, damage):
    damage(opened(folder).path(1))
    cache = opened(folder)
    assert [cache.open(shard) for shard in range(3)] == [True, False, True]
    cache.write(1, MOMENTS[4:8])
    assert cache.open(1)
    np.testing.assert_array_equal(cache[5], MOMENTS[5])


def test_a_shard_of_other_pictures_is_noticed(folder):
    cache = opened(folder)
    cache.path(1).write_bytes(cache.path(0).read_bytes())
    assert not cache.open(1)


def test_a_shard_of_moments_of_another_shape_is_noticed(folder):
    assert not LatentCache(folder, count=COUNT, shape=(2, 4, 4, 3)).open(0)


def test_a_flipped_byte_in_the_middle_is_an_error_that_says_what_to_do(folder):
    path = opened(folder).path(1)
    data = bytearray(path.read_bytes())
    data[data.index(MOMENTS[5].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    cache = opened(folder)
    assert cache.open(1)
    np.testing.assert_array_equal(cache[4], MOMENTS[4])
    with pytest.raises(UserError, match=r"00001-of-00003.array_record is damaged") as caught:
        cache[5]
    assert "Delete it, and run the same command again" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_record_that_belongs_elsewhere_is_noticed_although_it_is_whole(folder, monkeypatch):
    cache = opened(folder)
    with monkeypatch.context() as patched:
        places = cache.places(1)
        patched.setattr(LatentCache, "places", lambda self, shard: [places[i] for i in (0, 2, 1, 3)])
        cache.write(1, MOMENTS[[4, 6, 5, 7]])
    assert cache.open(1)
    with pytest.raises(UserError, match="does not match its checksum"):
        cache[5]


def test_what_fails_on_the_way_leaves_no_file_and_keeps_the_old_one(folder):
    def moments():
        yield MOMENTS[0]
        raise UserError("no more pictures")

    cache = opened(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="no more pictures"):
        cache.write(0, moments())
    with pytest.raises(ValueError, match="shorter"):
        cache.write(0, MOMENTS[:2])
    with pytest.raises(ValueError, match="float32"):
        cache.write(0, MOMENTS[:4].astype(np.float32))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write the latent cache"):
        opened(tmp_path / "file" / "cache").write(0, MOMENTS[:4])


def test_a_full_disk(folder):
    # A limit on the size of files fails the same way, and can be set in a process of its own.
    program = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from diffjax.data.latent_cache import LatentCache
        from diffjax.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        cache = LatentCache(Path(sys.argv[1]), count=100, shape=(2, 16, 16, 4))
        try:
            cache.write(0, np.random.default_rng(0).normal(size=(100, 2, 16, 16, 4)).astype("float16"))
        except UserError as error:
            print(error)
    """)
    before = sorted(folder.iterdir())
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Cannot write the latent cache" in done.stdout
    assert "File too large" in done.stdout
    assert "shards that are complete are kept" in done.stdout
    assert len(done.stdout.splitlines()) == 2
    assert sorted(folder.iterdir()) == before


def test_one_of_both_views_is_taken_at_random():
    choose, random = RandomView().random_map, np.random.default_rng(0)
    element = {"moments": MOMENTS[0], "index": 4}
    taken = [choose(element, random)["moments"] for _ in range(200)]
    mirrored = sum(np.array_equal(moments, MOMENTS[0, 1]) for moments in taken)
    assert sum(np.array_equal(moments, MOMENTS[0, 0]) for moments in taken) == 200 - mirrored
    assert 70 < mirrored < 130
