import os
import signal
import threading

import pytest

from diffjax.training.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_does_not_interrupt(number):
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        os.kill(os.getpid(), number)
        assert interrupt.requested == number.name


def test_the_second_ctrl_c_ends_the_program_at_once():
    with Interrupt(), pytest.raises(KeyboardInterrupt):  # noqa: PT012  the first must not raise it
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was swallowed")


def test_after_a_signal_the_next_sigterm_has_its_default_action():
    with Interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_it_leaves_signals_alone():
    found = []

    def run():
        with Interrupt() as interrupt:
            found.append(interrupt.requested)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGINT) == before
