"""Which signals stop a run between two steps, and which still interrupt."""

import contextlib
import os
import signal

import pytest

from k2jax.runtime.signals import Interrupted, StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_notice_is_a_wish_and_afterwards_all_is_as_before(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_schedulers_may_repeat_themselves_but_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert stop.requested
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interruption_passes_through_what_catches_every_exception():
    with pytest.raises(Interrupted), StopSignals() as stop:
        stop.interrupt_from_now_on()
        with contextlib.suppress(Exception):
            send(signal.SIGTERM)
        pytest.fail("the signal was swallowed")
