"""Signals to a process that is alone: the first is held back until the loop has stopped, the second is not."""

import os
import signal
from collections.abc import Iterator

import pytest

from jaxlm import distributed


@pytest.fixture
def came() -> Iterator[list[int]]:
    """Which signals have come through to the handlers that were there before."""
    numbers: list[int] = []
    before = {s: signal.signal(s, lambda number, _: numbers.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_held_back_and_the_second_is_not(number: signal.Signals, came: list[int]):
    with distributed.stop_signals() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
        assert came == []
        os.kill(os.getpid(), number)
        assert came == [number]


@pytest.mark.parametrize("signals", [0, 1, 2])
def test_handlers_are_restored_also_after_an_exception(signals: int, came: list[int]):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def stop() -> None:
        with distributed.stop_signals():
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(came) == max(signals - 1, 0)
