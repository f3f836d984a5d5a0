"""Ctrl-C is noted, and does what it did before."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from prefect_crew.runs.stop import ctrl_c_pressed, started_by_runner, watch_ctrl_c


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _handler_is_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def press_in_a_watch() -> bool:
    """Return whether the press was noted; it must interrupt as well."""
    noted = False
    with pytest.raises(KeyboardInterrupt), watch_ctrl_c():  # noqa: PT012  what is noted is gone after it
        try:
            press()
        finally:
            noted = ctrl_c_pressed()
    return noted


def run_until_interrupted(coroutine: Coroutine[Any, Any, None]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(coroutine)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        signal.signal(signal.SIGINT, before)


def test_it_is_noted_and_still_interrupts():
    assert press_in_a_watch()


def test_the_loop_raises_what_would_cut_a_step_in_two():
    steps: list[str] = []

    async def step() -> None:
        with watch_ctrl_c():
            press()
            steps.append("to its end")
            await asyncio.sleep(0)
            steps.append("the loop had ended before")

    run_until_interrupted(step())
    assert steps == ["to its end"]


def test_a_second_press_interrupts_at_once():
    async def stubborn() -> None:
        with watch_ctrl_c():
            press()
            with pytest.raises(KeyboardInterrupt):
                press()
            await asyncio.sleep(0.01)

    run_until_interrupted(stubborn())


def test_nothing_was_pressed():
    with watch_ctrl_c():
        assert not ctrl_c_pressed()


def test_a_press_from_before_is_forgotten():
    assert press_in_a_watch()
    with watch_ctrl_c():
        assert not ctrl_c_pressed()


def test_waits_within_waits_share_what_was_noted():
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with watch_ctrl_c():
            with watch_ctrl_c():
                press()
                assert ctrl_c_pressed()
            assert ctrl_c_pressed()
            with watch_ctrl_c():
                assert ctrl_c_pressed(), "a later wait of the same time knows it too"
        assert heard == [signal.SIGINT], "the handler from before is called, once"
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch_ctrl_c():
            press()
            assert ctrl_c_pressed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_somebody_sets_during_a_wait_is_kept():
    before = signal.getsignal(signal.SIGINT)

    def theirs(number: int, frame: Any) -> None:
        raise AssertionError("not called here")

    try:
        with watch_ctrl_c():
            signal.signal(signal.SIGINT, theirs)
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_no_handler_is_changed():
    handlers: list[Any] = []

    def wait() -> None:
        with watch_ctrl_c():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_a_runner_is_known_by_what_it_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    assert not started_by_runner()
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "5a0c")
    assert started_by_runner()
