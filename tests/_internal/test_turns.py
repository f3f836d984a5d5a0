"""Turns: changes of one event loop go one after the other once that is needed, records before ends before views."""

from __future__ import annotations

import asyncio

import pytest

from prefect_crew._internal import prefect_api
from prefect_crew._internal.prefect_api import Line, Rank, line_here


async def change(line: Line, rank: Rank, name: str, done: list[str], inside: list[int]) -> None:
    async with line.turn(rank):
        inside.append(inside[-1] + 1)
        await asyncio.sleep(0.01)
        done.append(name)
        inside.append(inside[-1] - 1)


async def test_nothing_waits_before_the_server_was_crowded():
    line, done, inside = Line(), list[str](), [0]
    await asyncio.gather(*(change(line, Rank.RECORD, str(number), done, inside) for number in range(3)))
    assert max(inside) == 3


async def test_afterwards_one_goes_after_the_other_ends_late_and_views_last():
    line, done, inside = Line(), list[str](), [0]
    line.form()
    kinds = {"view": Rank.VIEW, "a": Rank.RECORD, "other view": Rank.VIEW, "end": Rank.END, "b": Rank.RECORD}
    await asyncio.gather(*(change(line, rank, name, done, inside) for name, rank in kinds.items()))
    assert max(inside) == 1
    # The first one found nobody there.
    assert done == ["view", "a", "b", "end", "other view"]


async def test_who_gives_up_waiting_takes_no_turn_away(monkeypatch: pytest.MonkeyPatch):
    line, done, inside = Line(), list[str](), [0]
    line.form()
    jobs = [asyncio.ensure_future(change(line, Rank.RECORD, str(n), done, inside)) for n in range(4)]
    await asyncio.sleep(0)
    jobs[1].cancel()
    await asyncio.gather(*jobs, return_exceptions=True)
    assert done == ["0", "2", "3"]
    await change(line, Rank.RECORD, "later", done, inside)
    assert done[-1] == "later"


async def test_a_cancellation_at_the_moment_of_the_turn_hands_it_on():
    line, done, inside = Line(), list[str](), [0]
    line.form()
    async with line.turn(Rank.RECORD):
        waiting = asyncio.ensure_future(change(line, Rank.RECORD, "cancelled", done, inside))
        after = asyncio.ensure_future(change(line, Rank.RECORD, "after", done, inside))
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, after, return_exceptions=True)
    assert done == ["after"]


async def test_a_request_that_hangs_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefect_api, "LONGEST", 0.02)
    line, done, inside = Line(), list[str](), [0]
    line.form()
    async with line.turn(Rank.RECORD):
        await asyncio.wait_for(change(line, Rank.RECORD, "other", done, inside), 5)
    assert done == ["other"]
    await asyncio.wait_for(change(line, Rank.RECORD, "next", done, inside), 5)


def test_each_event_loop_has_its_own():
    async def line() -> Line:
        assert line_here() is line_here()
        return line_here()

    assert asyncio.run(line()) is not asyncio.run(line())
