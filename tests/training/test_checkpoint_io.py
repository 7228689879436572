import contextlib
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.parallel.mesh import make_mesh, replicated
from diffjax.training.checkpoint import FOLDER, Checkpoints
from diffjax.training.state import TrainState, create_state, state_shardings

OPTIMIZER = optax.adamw(1e-3)
DATA = {"next_index": 7, "nested": {"seed": 1}}


def make_state(step, shape=(16, 4)):
    """A state whose every array is random, NaNs of any bits excluded."""
    random = np.random.default_rng(step)
    params = {"w": jnp.zeros(shape), "b": {"c": jnp.zeros((3,))}}
    state = create_state(params, OPTIMIZER)

    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(step, leaf.dtype)
        return jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, state)


def abstract(state, sharding=None):
    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding)

    return jax.tree.map(describe, state)


def host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def save(folder, *steps, keep=2, **options):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(make_state(step, **options), DATA | {"next_index": step})
    checkpoints.wait()
    checkpoints.close()


def restore(folder, like=None):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(abstract(make_state(0) if like is None else like))
    finally:
        checkpoints.close()


def files_of(folder, step, item):
    """The data files of an item, largest first."""
    paths = [path for path in (folder / FOLDER / str(step) / item).rglob("d/*") if path.is_file()]
    return sorted(paths, key=lambda path: -path.stat().st_size)


def assert_short(error, *words):
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    for word in words:
        assert word in text


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 3)
    state, data = restore(tmp_path)
    assert isinstance(state, TrainState)
    assert jax.tree.structure(state) == jax.tree.structure(make_state(3))
    assert_same(state, make_state(3))
    assert data == DATA | {"next_index": 3}


def test_no_checkpoint_is_no_step(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    checkpoints.close()
    with pytest.raises(UserError, match="there is no checkpoint in"):
        restore(tmp_path)


def test_the_averaged_parameters_can_be_read_alone(tmp_path):
    save(tmp_path, 5)
    for item in ("params", "rest"):
        shutil.rmtree(tmp_path / FOLDER / "5" / item)
    checkpoints = Checkpoints(tmp_path)
    params = checkpoints.restore_ema(abstract(make_state(0).ema_params))
    checkpoints.close()
    assert_same(params, make_state(5).ema_params)


def test_updates_that_donate_the_state_do_not_reach_what_is_being_saved(tmp_path):
    # Large enough that the files are still being written while the updates run in the same buffers.
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = make_state(1, shape=(1024, 1024))
    expected = host(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, DATA)
    for _ in range(20):
        state = update(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    checkpoints.close()
    saved, _ = restore(tmp_path, like=state)
    assert_same(saved, expected)


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), DATA)
    checkpoints.save(make_state(1), DATA)
    checkpoints.wait()
    assert checkpoints.latest_step() == 1
    checkpoints.close()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept_and_nothing_is_left_over(tmp_path, keep):
    save(tmp_path, 1, 2, 3, 4, keep=keep)
    left = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert left == [str(step) for step in range(5 - keep, 5)]
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_state_can_be_restored_to_another_sharding(tmp_path):
    whole = make_state(2)
    save(tmp_path, 2)
    mesh = make_mesh(data=4, fsdp=2)
    places = {"w": NamedSharding(mesh, PartitionSpec("fsdp")), "b": {"c": replicated(mesh)}}
    shapes = jax.eval_shape(lambda: whole)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(shapes, OPTIMIZER, mesh, places),
    )
    checkpoints = Checkpoints(tmp_path)
    state, _ = checkpoints.restore(target)
    checkpoints.close()
    assert_same(state, whole)
    for tree in (state.params, state.ema_params, optax.tree_utils.tree_get(state.opt_state, "mu")):
        assert {shard.data.shape for shard in tree["w"].addressable_shards} == {(8, 4)}
        assert len(tree["w"].sharding.device_set) == 8


@pytest.mark.parametrize("item", ["params", "ema_params", "rest"])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "empty"])
def test_where_no_checkpoint_is_sound_the_error_says_what_was_found(tmp_path, item, damage):
    save(tmp_path, 2)
    for path in files_of(tmp_path, 2, item):
        if damage == "deleted":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(UserError) as error:
        restore(tmp_path)
    assert_short(error, f"step 2: the file {item}/d/", str(tmp_path / FOLDER))


def test_a_checkpoint_of_another_network_is_an_error(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        restore(tmp_path, like=make_state(0, shape=(16, 5)))
    assert "ema_params/w: float32 [16, 4] there, float32 [16, 5] wanted" in str(error.value)
    assert str(tmp_path / FOLDER / "1") in str(error.value)
    assert len(str(error.value).splitlines()) == 1 + 4
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["1"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path)
    assert_short(error, str(tmp_path / FOLDER))


@contextlib.contextmanager
def full_disk():
    """As on a full disk, writing fails: every file may have 64 KiB, and large states have some megabytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_ones_and_is_said_at_once_and_at_the_end(tmp_path):
    save(tmp_path, 1)
    said = []
    checkpoints = Checkpoints(tmp_path, log=said.append)
    with full_disk():
        checkpoints.save(make_state(2, shape=(512, 512)), DATA)
        with pytest.raises(UserError) as error:
            checkpoints.wait()
    assert checkpoints.failed
    assert checkpoints.latest_step() == 1
    checkpoints.close()  # it has been said
    assert len(said) == 1
    assert said[0].startswith("warning: the checkpoint of step 2")
    assert_short(error, "could not be written", "File too large", "checkpoint of step 1 is intact", "4.0 MiB")
    assert checkpoints.steps() == [1]
    state, _ = restore(tmp_path)
    assert_same(state, make_state(1))


def test_after_a_full_disk_the_run_goes_on_and_the_next_save_succeeds(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, log=said.append)
    with full_disk():
        for step in (1, 2):  # neither raises
            checkpoints.save(make_state(step, shape=(512, 512)), DATA)
        with pytest.raises(UserError, match="There is no older checkpoint"):
            checkpoints.close()
    assert len(said) == 2
    checkpoints = Checkpoints(tmp_path, log=said.append)
    for step in (3, 4):  # the second removes what Orbax's threads may have left after the failures
        checkpoints.save(make_state(step, shape=(512, 512)), DATA)
        checkpoints.wait()
        assert not checkpoints.failed
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["3", "4"]
    assert_same(restore(tmp_path, like=make_state(0, shape=(512, 512)))[0], make_state(4, shape=(512, 512)))


def test_what_a_killed_process_left_half_written_is_not_used(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / FOLDER / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / FOLDER / "1", half)
    (half / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    state, _ = restore(tmp_path)
    assert_same(state, make_state(1))
    save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["1", "2"]
