"""The flag that Ctrl-C and SIGTERM set."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from ppo_nlu.runtime.stop_request import StopRequest


@pytest.fixture
def handlers() -> Iterator[None]:
    """Whatever a test does, the handlers of the test run come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_only_sets_the_flag(
    handlers: None, capfd: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop and not stop.requested and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop and stop.requested and stop.exit_code == code
        signal.raise_signal(signal.SIGTERM)  # a scheduler may repeat itself
        assert stop.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_handlers_come_back_after_an_error(handlers: None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
