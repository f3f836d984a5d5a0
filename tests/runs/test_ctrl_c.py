"""Ctrl-C is noted, and does what it did before."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prefect_crew.runs import stop
from prefect_crew.runs.stop import cancellation_asked, watch_ctrl_c


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is handler, "it is put back"
    finally:
        signal.signal(signal.SIGINT, before)


def run_until_interrupted(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = asyncio.new_event_loop()
    with handled_by(signal.default_int_handler):
        try:
            with pytest.raises(KeyboardInterrupt):
                loop.run_until_complete(work())
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()


def test_the_loop_raises_what_would_cut_a_step_in_two():
    steps: list[str] = []

    async def step() -> None:
        with watch_ctrl_c():
            press()
            steps.append("to its end")
            await asyncio.sleep(0)
            steps.append("the loop had ended before")

    run_until_interrupted(step)
    assert steps == ["to its end"]


def test_a_second_press_interrupts_at_once():
    async def stubborn() -> None:
        with watch_ctrl_c():
            press()
            with pytest.raises(KeyboardInterrupt):
                press()
            await asyncio.sleep(0.01)

    run_until_interrupted(stubborn)


async def test_waits_within_waits_share_what_was_noted_and_later_ones_forget_it():
    heard: list[int] = []
    with handled_by(lambda number, _: heard.append(number)):
        with watch_ctrl_c():
            assert not await cancellation_asked(None)
            with watch_ctrl_c():
                press()
            with watch_ctrl_c():
                assert await cancellation_asked(None), "a later wait of the same time knows it too"
        assert heard == [signal.SIGINT], "the handler from before is called, once"
        with watch_ctrl_c():
            assert not await cancellation_asked(None)


async def test_an_ignored_signal_stays_ignored():
    with handled_by(signal.SIG_IGN), watch_ctrl_c():
        press()
        assert await cancellation_asked(None)


async def test_a_handler_that_somebody_sets_during_a_wait_is_kept():
    def theirs(number: int, frame: Any) -> None:
        raise AssertionError("not called here")

    before = signal.getsignal(signal.SIGINT)
    try:
        with watch_ctrl_c():
            signal.signal(signal.SIGINT, theirs)
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["in a thread", "under a runner"])
async def test_no_handler_is_changed(where: str, monkeypatch: pytest.MonkeyPatch):
    def wait() -> Any:
        with watch_ctrl_c():
            return signal.getsignal(signal.SIGINT)

    if where == "under a runner":
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "5a0c")
        assert stop.started_by_runner()
    during = await asyncio.to_thread(wait) if where == "in a thread" else wait()
    assert during is signal.getsignal(signal.SIGINT)
