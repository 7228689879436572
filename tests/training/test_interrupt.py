import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffjax.training.interrupt import INTERRUPTED, Interrupt

BOTH = [signal.SIGINT, signal.SIGTERM]

# `deaf` stands for a compiler: busy for a minute, without a look at signals; other threads may run.
DEAF = """
import hashlib, os, threading, time
from diffjax.training.interrupt import Interrupt
def deaf():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
def send(*numbers):
    def run():
        for number in numbers:
            time.sleep(0.3)
            os.kill(os.getpid(), number)
    threading.Thread(target=run, daemon=True).start()
"""


def run(code):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", DEAF + code], capture_output=True, text=True, timeout=60, check=False
    )
    return done, time.monotonic() - began


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_remembered_and_does_not_interrupt(number):
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        os.kill(os.getpid(), number)
        wait_until(lambda: interrupt.requested)
        assert interrupt.requested == number.name


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("wait", ["time.sleep(50)", "deaf()"])
def test_the_second_signal_ends_the_program_at_once(number, wait):
    done, seconds = run(f"with Interrupt():\n    send({number:d}, {number:d})\n    {wait}\n    {wait}")
    assert done.returncode == 128 + number
    assert len(done.stderr.splitlines()) == 1
    assert number.name in done.stderr
    assert seconds < 30


@pytest.mark.parametrize("number", BOTH)
def test_where_there_is_nothing_to_lose_the_first_signal_ends_the_block(number):
    code = f"""
with Interrupt() as interrupt:
    try:
        with interrupt.at_once("nothing was lost"):
            send({number:d})
            time.sleep(50)
    except KeyboardInterrupt:
        print(interrupt.requested)
"""
    done, seconds = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{number.name}\n", "")
    assert seconds < 30


def test_also_while_a_compiler_keeps_the_main_thread():
    code = f"""
with Interrupt() as interrupt, interrupt.at_once("nothing was lost"):
    send({signal.SIGTERM:d})
    deaf()
"""
    done, seconds = run(code)
    assert done.returncode == INTERRUPTED
    assert done.stderr == "SIGTERM: nothing was lost\n"
    assert seconds < 30


def test_a_signal_of_before_ends_the_block_where_it_begins():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: interrupt.requested)
        with pytest.raises(KeyboardInterrupt), interrupt.at_once("nothing was lost"):
            pytest.fail("the block was entered")


def test_after_the_block_a_signal_is_only_remembered():
    with Interrupt() as interrupt:
        with interrupt.at_once("nothing was lost"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: interrupt.requested)


def test_the_handlers_and_threads_of_before_come_back():
    before = [signal.getsignal(number) for number in BOTH]
    threads = threading.active_count()
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: interrupt.requested)
    assert [signal.getsignal(number) for number in BOTH] == before
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_in_another_thread_it_leaves_signals_alone():
    found = []

    def run():
        with Interrupt() as interrupt, interrupt.at_once("nothing was lost"):
            found.append(interrupt.requested)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGINT) == before
