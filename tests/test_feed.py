"""Which batch an update was given, and from where the data go on when a run goes back."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.feed import Feed
from diffjax.parallel.mesh import make_mesh


class Tens:
    """Batches of the examples 10 n to 10 n + 7, of which the position is n."""

    def __init__(self):
        self.next, self.closed = 0, False

    def __next__(self):
        places = 10 * self.next + np.arange(8)
        self.next += 1
        return {"index": places, "image": places.astype(np.float32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]

    def close(self):
        self.closed = True


@pytest.fixture
def feed():
    def finish(batch, step):
        return {"image": batch["image"] + 1000.0 * step}

    feed = Feed(Tens(), make_mesh(), finish, remember=3)
    yield feed
    feed.close()


def take(feed, *numbers):
    return [float(feed.take(jnp.int32(n - 1), n)["image"][0]) for n in numbers]


def test_batches_are_finished_at_their_steps_and_remembered(feed):
    assert take(feed, 1, 2, 3) == [0.0, 1010.0, 2020.0]
    assert feed.get_state() == {"next": 3}  # whatever was read ahead
    second = feed.taken(2)
    assert (second.step, second.before, second.after) == (2, {"next": 1}, {"next": 2})
    np.testing.assert_array_equal(second.places, 10 + np.arange(8))


def test_of_what_is_forgotten_the_oldest_stands_in(feed):
    take(feed, 1, 2, 3, 4, 5)
    assert feed.taken(1).step == feed.taken(3).step == 3
    assert feed.taken(5).step == 5


def test_after_going_back_the_numbers_of_updates_mean_the_new_batches(feed):
    take(feed, 1, 2, 3)
    feed.go_to({"next": 7})
    assert take(feed, 2, 3) == [1070.0, 2080.0]
    assert feed.taken(2).before == {"next": 7}
    assert feed.taken(1).step == 2


def test_closing_ends_the_loader_too():
    loader = Tens()
    Feed(loader, make_mesh(), lambda batch, step: batch, remember=1).close()
    assert loader.closed
