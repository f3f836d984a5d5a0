"""Waiting for something at most so long."""

from __future__ import annotations

import asyncio

import pytest

from prefect_crew.patience import end, within


async def soon(seconds: float, ended: list[str]) -> str:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
    ended.append("done")
    return "result"


async def test_what_is_done_in_time_gives_its_result():
    assert await within(5, soon(0.01, [])) == "result"


async def test_what_takes_too_long_is_cancelled():
    ended: list[str] = []
    with pytest.raises(TimeoutError):
        await within(0.05, soon(60, ended))
    assert ended == ["cancelled"]


async def test_an_error_is_raised_as_it_is():
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await within(5, fail())


async def test_a_cancellation_cancels_the_work():
    ended: list[str] = []
    waiting = asyncio.ensure_future(within(60, soon(60, ended)))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == ["cancelled"]


async def test_a_cancellation_at_the_moment_at_which_the_work_is_done_is_not_lost():
    event = asyncio.Event()
    waiting = asyncio.ensure_future(within(60, event.wait()))
    await asyncio.sleep(0.01)
    event.set()
    await asyncio.sleep(0)  # the work is done, and nobody has looked yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_loses_a_cancellation_is_cancelled_once_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.patience.AGAIN", 0.05)
    lost: list[str] = []

    async def deaf() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append("once")

    task = asyncio.ensure_future(deaf())
    await asyncio.sleep(0)
    await asyncio.wait_for(end(task), 5)
    assert task.cancelled()
    assert lost == ["once"]
