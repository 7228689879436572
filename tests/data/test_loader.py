import json
import threading

import numpy as np
import pytest

from diffjax.data.checked import without
from diffjax.data.loader import make_loader
from diffjax.data.rejects import Rejects
from diffjax.data.source import BadExample, Example
from diffjax.data.transforms import random_crop, resize
from diffjax.errors import UserError

SIZE = 37


class Numbered:
    """A source whose picture `i` can be told by its pixels."""

    name, resolution = "numbered", 8

    def __init__(self, size=SIZE):
        self.captions = self.keys = self.concepts = self.styles = [str(i) for i in range(size)]

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        image = (np.arange(192).reshape(8, 8, 3) + i).astype(np.uint8)
        return Example(image, *[str(i)] * 4)


def loader(**options):
    return make_loader(Numbered(), **{"batch_size": 5, "seed": 0, "num_threads": 2} | options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch["index"], other["index"])
        np.testing.assert_array_equal(batch["image"], other["image"])


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


BAD = (0, 5, 6, 7, 20, 36)


class Partly(Numbered):
    """Some of its pictures cannot be used."""

    labels, classes = (), ()

    def __getitem__(self, i):
        if i in BAD:
            raise BadExample(self.keys[i], "truncated")
        return super().__getitem__(i)


def substitute(i):
    while i in BAD:
        i = (i + 1) % SIZE
    return i


def partly(rejects=None, **options):
    rejects = Rejects() if rejects is None else rejects
    return make_loader(Partly(), **{"batch_size": 6, "seed": 0, "rejects": rejects} | options)


def test_batches_hold_images_and_their_places():
    batch = next(loader())
    assert batch.keys() == {"image", "index"}
    assert (batch["image"].shape, batch["image"].dtype) == ((5, 8, 8, 3), np.uint8)
    assert (batch["index"].shape, batch["index"].dtype) == ((5,), np.int32)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])


def test_each_epoch_has_every_picture_once_in_another_order():
    order = indices(take(loader(), 2 * SIZE))[: 3 * SIZE]
    epochs = [order[i * SIZE : (i + 1) * SIZE] for i in range(3)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_without_shuffling():
    assert indices(take(loader(shuffle=False), 15))[: 2 * SIZE] == [*range(SIZE)] * 2


def test_the_seed_decides_everything():
    options = {"transforms": [random_crop(4)]}
    assert_equal(take(loader(seed=3, **options), 10), take(loader(seed=3, num_threads=0, **options), 10))
    assert indices(take(loader(seed=3), 7)) != indices(take(loader(seed=4), 7))


@pytest.mark.parametrize("consumed", [0, 1, 3, 8, 20])  # an epoch is 7.4 batches
@pytest.mark.parametrize("num_threads", [0, 3])
def test_a_restored_loader_continues_with_the_same_batches(consumed, num_threads):
    options = {"transforms": [random_crop(4)], "num_threads": num_threads, "prefetch": 4}
    original = loader(**options)
    take(original, consumed)
    state = json.loads(json.dumps(original.get_state()))
    expected = take(original, 10)

    fresh = loader(**options)
    fresh.set_state(state)
    assert_equal(take(fresh, 10), expected)
    used = loader(**options)
    take(used, 5)
    used.set_state(state)
    assert_equal(take(used, 10), expected)


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[0, 3, 4], [1, 2, 5]]])
def test_processes_share_each_batch(shares):
    options = {"batch_size": 6, "seed": 1, "transforms": [random_crop(4)]}
    whole = take(loader(**options), 14)
    for rows in shares:
        for part, batch in zip(take(loader(rows=rows, **options), 14), whole, strict=True):
            assert_equal([part], [{name: array[rows] for name, array in batch.items()}])


# 111 pictures fill 13 batches of 8; seven more are left out, though some processes would have all of theirs.
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5], [6, 7]])
def test_all_processes_see_equally_many_batches(rows):
    seen = list(loader(num_epochs=3, batch_size=8, rows=rows))
    assert [len(batch["index"]) for batch in seen] == [len(rows)] * 13


def test_a_position_does_not_depend_on_the_number_of_processes():
    alone, second = loader(batch_size=6), loader(batch_size=6, rows=[3, 4, 5])
    take(alone, 4)
    take(second, 4)
    assert alone.get_state() == second.get_state()
    resumed = loader(batch_size=6, rows=[0, 1])
    resumed.set_state(second.get_state())
    np.testing.assert_array_equal(next(resumed)["index"], next(alone)["index"][:2])


def test_a_batch_may_be_larger_than_the_source():
    order = indices(take(loader(batch_size=100), 2))
    assert sorted(order[:SIZE]) == sorted(order[SIZE : 2 * SIZE]) == list(range(SIZE))


@pytest.mark.parametrize("num_threads", [0, 8])
@pytest.mark.parametrize("rows", [range(6), [0, 1], [2, 3, 4], [5]])
def test_the_places_of_bad_examples_are_taken_by_the_next_usable_ones(num_threads, rows):
    """The same for every number of threads and processes; the index is that of the picture."""
    options = {"transforms": [random_crop(8)], "num_threads": num_threads, "rows": rows}
    batches = take(partly(**options), 3 * SIZE)
    order = indices(take(loader(batch_size=6, rows=rows), 3 * SIZE))
    assert indices(batches) == [substitute(i) for i in order]
    for batch in batches:
        assert batch["image"].shape == (len(rows), 8, 8, 3)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])


def test_a_resumed_loader_replaces_bad_examples_alike(tmp_path):
    options = {"transforms": [random_crop(4)], "num_threads": 3, "prefetch": 4}
    original = partly(Rejects(tmp_path), **options)
    take(original, 4)
    state = original.get_state()
    expected = take(original, 20)
    resumed = partly(Rejects(tmp_path, resumed=True), **options)
    resumed.set_state(state)
    assert_equal(take(resumed, 20), expected)


def test_without_what_is_known_to_be_bad_it_is_the_loader_of_the_others():
    class Survivors(Numbered):
        """The pictures that can be used, and no others."""

        def __init__(self):
            self.captions = self.keys = self.concepts = self.styles = [
                str(i) for i in range(SIZE) if i not in BAD
            ]

        def __getitem__(self, i):
            return Numbered()[int(self.keys[i])]

    options = {"batch_size": 6, "seed": 3, "transforms": [random_crop(4)]}
    left = without(Partly(), np.isin(np.arange(SIZE), BAD))
    found, others = make_loader(left, **options), make_loader(Survivors(), **options)
    assert_equal(take(found, 20), take(others, 20))
    assert found.get_state() == others.get_state()


def test_a_bad_example_is_an_error_where_nobody_notes_it():
    with pytest.raises(BadExample):
        take(make_loader(Partly(), batch_size=6, seed=0), SIZE)


def test_too_many_bad_examples_end_the_iterator():
    with pytest.raises(UserError, match=r"max_rejects=0.01"):
        take(partly(Rejects(max_share=0.01)), SIZE)


class Renamed(Numbered):
    """As many examples, under other names."""

    def __init__(self):
        super().__init__()
        self.keys = [f"new {key}" for key in self.keys]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Numbered(36), "37 examples could be used then, and 36 now"),
        (Renamed(), "names, captions or resolution"),
    ],
)
def test_a_position_in_other_data_is_refused(source, words):
    state = json.loads(json.dumps(loader().get_state()))
    assert state["source"]["examples"] == SIZE
    with pytest.raises(UserError, match=f"data have changed since this run was saved: .*{words}"):
        make_loader(source, batch_size=5, seed=0).set_state(state)


def test_a_position_that_says_nothing_of_its_data_is_accepted():
    original, resumed = loader(), loader()
    take(original, 3)
    resumed.set_state({"next_index": 15})
    assert_equal(take(resumed, 3), take(original, 3))


def test_transforms_are_applied_in_order():
    transforms = [resize(8, 4), lambda element: {**element, "double": 2 * element["index"]}, random_crop(3)]
    batch = next(loader(transforms=transforms))
    assert batch["image"].shape == (5, 3, 3, 3)
    np.testing.assert_array_equal(batch["double"], 2 * batch["index"])


def test_crops_differ_between_elements_and_epochs():
    class Constant(Numbered):
        def __getitem__(self, i):
            return super().__getitem__(0)

    batches = take(make_loader(Constant(2), batch_size=2, seed=0, transforms=[random_crop(4)]), 50)
    corners = {int(corner) for batch in batches for corner in batch["image"][:, 0, 0, 0]}
    assert len(corners) == 25


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    iterator = loader(num_threads=3)
    take(iterator, 4)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_an_error_in_the_source_reaches_the_caller():
    class Broken(Numbered):
        def __getitem__(self, i):
            raise UserError("the cache is damaged")

    with pytest.raises(UserError, match="the cache is damaged"):
        next(make_loader(Broken(), batch_size=2, seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"seed": -1}, "seed"),
        ({"num_epochs": 1, "batch_size": 38}, "1 epochs of 37 pictures"),
        ({"num_epochs": 0}, "0 epochs"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)


def test_an_empty_source():
    with pytest.raises(UserError, match="empty"):
        make_loader(Numbered(0), batch_size=1, seed=0)


def test_real_pictures(cache_dir):
    from diffjax.data.emoji import load_emoji

    source = load_emoji(cache_dir, resolution=64, num_concepts=20)
    batch = next(make_loader(source, batch_size=8, seed=0, transforms=[resize(64, 32)]))
    assert batch["image"].shape == (8, 32, 32, 3)
