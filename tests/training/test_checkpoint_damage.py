"""What is done to the files of a checkpoint is noticed, and a run goes on from the one before."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_checkpoint_io import DATA, OPTIMIZER, abstract, assert_same, make_state, save

from diffjax.errors import UserError
from diffjax.training import archive, manifest
from diffjax.training.checkpoint import FOLDER, Checkpoints
from diffjax.training.state import create_state


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with sealed checkpoints of the steps 1 and 2; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


def copy(two, tmp_path, *, sealed=True):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(two, run)
    if not sealed:
        (run / FOLDER / "2" / manifest.SEAL).unlink()
    return run


def restore(run, said=None, like=None, **options):
    checkpoints = Checkpoints(run, log=(said if said is not None else []).append, **options)
    try:
        return checkpoints.restore(abstract(make_state(0) if like is None else like))
    finally:
        checkpoints.close()


def names(run):
    return sorted(path.name for path in (run / FOLDER).iterdir())


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flips(content, random, count=3):
    """The content with one bit flipped: in the first byte, the last, and some between."""
    for place in (0, len(content) - 1, *random.integers(0, len(content), count)):
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        yield bytes(changed)


def cuts(content):
    return {b"", content[: len(content) // 2], content[:-1]} - {content}


def noticed(folder):
    try:
        manifest.check_seal(folder)
        manifest.read(folder)
    except manifest.DamageError:
        return True
    return False


def test_every_flipped_bit_every_cut_and_every_loss_in_every_file_is_noticed(two, tmp_path):
    folder = copy(two, tmp_path) / FOLDER / "2"
    random = np.random.default_rng(0)
    assert not noticed(folder)
    paths = files(folder)
    assert len(paths) > 30
    count = 0
    for path in paths:
        content = path.read_bytes()
        for damaged in (*flips(content, random), *cuts(content), content + b"\0"):
            path.write_bytes(damaged)
            assert noticed(folder), (path, len(damaged))
            count += 1
        path.unlink()
        if path.name != manifest.SEAL:  # without it a checkpoint is one that is not sealed yet
            assert noticed(folder), path
        path.write_bytes(content)
    assert count > 250
    assert not noticed(folder)


@pytest.mark.slow
def test_without_a_seal_damage_is_noticed_or_does_not_matter(two, tmp_path):
    # Orbax writes files that it does not read again; but what is restored is right, or step 1 is.
    random = np.random.default_rng(1)
    fell_back = 0
    for path in files(two / FOLDER / "2"):
        if path.name == manifest.SEAL:
            continue
        for damaged in (*flips(path.read_bytes(), random, 0), b""):
            run = copy(two, tmp_path, sealed=False)
            (run / path.relative_to(two)).write_bytes(damaged)
            state, data = restore(run)
            step = int(state.step)
            assert_same(state, make_state(step))
            assert data == DATA | {"next_index": step}
            assert names(run) == (["1", "2"] if step == 2 else ["1", "damaged-2"])
            fell_back += step == 1
    assert fell_back > 30


@pytest.mark.parametrize("item", manifest.ARRAYS)
def test_an_array_that_changed_before_it_was_sealed_is_noticed_by_its_digest(two, tmp_path, item):
    # The files of another state, whole and sealed: only the digests in the manifest can tell.
    run, other = copy(two, tmp_path), tmp_path / "other"
    save(other, 9)
    folder = run / FOLDER / "2"
    shutil.rmtree(folder / item)
    shutil.copytree(other / FOLDER / "9" / item, folder / item)
    manifest.write_seal(folder)
    said = []
    state, _ = restore(run, said)
    assert int(state.step) == 1
    assert f"the digests of {item}/" in said[0]
    problems = archive.verify(run / FOLDER / "damaged-2")
    assert len(problems) == 1
    assert f"the digests of {item}/" in problems[0]


def test_the_run_goes_on_from_the_one_before_and_the_damaged_one_is_kept(two, tmp_path):
    run = copy(two, tmp_path)
    victim = max(files(run / FOLDER / "2" / "params" / "d"), key=lambda path: path.stat().st_size)
    os.truncate(victim, 100)
    before = {str(p.relative_to(run / FOLDER / "2")): p.read_bytes() for p in files(run / FOLDER / "2")}
    said = []
    state, data = restore(run, said)
    assert_same(state, make_state(1))
    assert data["next_index"] == 1
    assert len(said) == 1
    for words in ("step 2", f"params/d/{victim.name}", "100 bytes", "damaged-2", "step 1 is used"):
        assert words in said[0]
    # The step can be saved again, and nothing deletes the damaged one.
    save(run, 2, 3, 4, keep=1)
    assert names(run) == ["4", "damaged-2"]
    damaged = run / FOLDER / "damaged-2"
    assert {str(p.relative_to(damaged)): p.read_bytes() for p in files(damaged)} == before


def test_where_all_are_damaged_all_are_named_and_stay(two, tmp_path):
    run = copy(two, tmp_path)
    for step in ("1", "2"):
        (run / FOLDER / step / "data" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"no sound checkpoint(.|\n)*step 2: the file data(.|\n)*step 1: the"):
        restore(run)
    assert names(run) == ["1", "2"]  # or the next try would start anew


def test_sampling_renames_nothing_and_does_not_take_damaged_parameters(two, tmp_path):
    run = copy(two, tmp_path)
    (run / FOLDER / "2" / "params" / "_METADATA").write_text("")  # of which sampling reads nothing
    checkpoints = Checkpoints(run)
    params = checkpoints.restore_ema(abstract(make_state(0).ema_params))
    assert_same(params, make_state(2).ema_params)
    (run / FOLDER / "2" / "ema_params" / "_METADATA").write_text("")
    with pytest.raises(UserError, match=r"step 2 in .* is damaged: the file ema_params/_METADATA"):
        checkpoints.restore_ema(abstract(make_state(0).ema_params))
    checkpoints.close()
    assert names(run) == ["1", "2"]


def test_a_checkpoint_that_was_not_sealed_in_time_is_used(two, tmp_path):
    run = copy(two, tmp_path, sealed=False)
    said = []
    state, _ = restore(run, said)
    assert_same(state, make_state(2))
    assert not said


def test_a_checkpoint_from_before_there_were_digests_is_used_and_said_so(two, tmp_path):
    run = copy(two, tmp_path, sealed=False)
    folder = run / FOLDER / "2"
    shutil.rmtree(folder / manifest.ITEM)
    said = []
    with pytest.raises(UserError, match="no sound checkpoint"):  # it is one that has lost its manifest
        restore_only(run, 2)
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del metadata["item_handlers"][manifest.ITEM]
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    state, _ = restore(run, said)
    assert_same(state, make_state(2))
    assert "not verified" in said[0]


def restore_only(run, step):
    aside = run.parent / "aside"
    (run / FOLDER / "1").rename(aside)
    try:
        return restore(run)
    finally:
        aside.rename(run / FOLDER / "1")


def test_going_back_takes_the_newest_sound_one_before_a_step_and_leaves_the_later_ones(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=4)
    (tmp_path / FOLDER / "2" / "data" / "metadata").write_text("{}")
    said = []
    checkpoints = Checkpoints(tmp_path, log=said.append)
    state, _ = checkpoints.restore(abstract(make_state(0)), before=2)
    assert int(state.step) == 1
    checkpoints.set_aside(after=1)
    assert checkpoints.latest_step() == 1
    assert names(tmp_path) == ["1", "damaged-2", "left-3", "left-4"]
    assert [f"left-{step}" in line for step, line in zip((3, 4), said[1:], strict=True)] == [True, True]
    with pytest.raises(UserError, match="there is no checkpoint of step 0 or before"):
        checkpoints.restore(abstract(make_state(0)), before=0)
    checkpoints.close()


def test_those_of_the_least_loss_and_those_at_intervals_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=1)
    for step, loss in enumerate((0.9, 0.2, 0.5, 0.6, 0.7, 0.4), start=1):
        checkpoints.save(make_state(step), DATA, loss=loss)
    checkpoints.close()
    assert names(tmp_path) == ["2", "4", "6"]


def config(**changes):
    return ConfigDict(
        {"steps": 10, "log_every": 1, "optimizer": {"decay": "cosine", "rate": 1e-3}, **changes}
    )


def test_a_checkpoint_of_another_configuration_is_refused_whatever_lies_beside_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, config=config(seed=1))
    checkpoints.save(make_state(1), DATA)
    checkpoints.close()
    state, _ = restore(tmp_path, config=config(seed=1, log_every=7))  # which changes nothing that is learnt
    assert_same(state, make_state(1))
    with pytest.raises(UserError, match="another configuration:\n  seed: 1 there, 2 now\n"):
        restore(tmp_path, config=config(seed=2))
    assert names(tmp_path) == ["1"]


def test_arrays_that_do_not_fit_are_listed(tmp_path):
    save(tmp_path, 1)
    params = {"w": jnp.zeros((16, 4), jnp.bfloat16), "new": jnp.zeros(2)}
    with pytest.raises(UserError) as error:
        restore(tmp_path, like=create_state(params, OPTIMIZER))
    lines = str(error.value).splitlines()
    assert "12 arrays differ" in lines[0]
    assert "  params/b/c: float32 [3] there, none wanted" in lines
    assert "  params/new: none there, float32 [2] wanted" in lines
    assert "  params/w: float32 [16, 4] there, bfloat16 [16, 4] wanted" in lines
    assert lines[-1] == "  …"


def test_the_manifest_names_every_array_and_holds_the_configuration(tmp_path):
    checkpoints = Checkpoints(tmp_path, config=config())
    checkpoints.save(make_state(7), DATA, loss=0.25)
    checkpoints.close()
    body = manifest.read(tmp_path / FOLDER / "7")
    leaves = jax.tree.leaves(make_state(7))
    assert sum(len(body["arrays"][item]) for item in manifest.ARRAYS) == len(leaves)
    assert (body["step"], body["loss"]) == (7, 0.25)
    assert body["config"] == json.loads(config().to_json())
    assert body["arrays"]["params"]["w"]["shape"] == [16, 4]
    assert body["arrays"]["rest"]["opt_state/0/count"]["dtype"] == "int32"
    assert manifest.is_sealed(tmp_path / FOLDER / "7")
