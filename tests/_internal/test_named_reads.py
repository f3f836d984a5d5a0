"""Reads by name that are asked for at the same time share requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from prefect_crew._internal.prefect_api import NAMES_AT_ONCE, NamedReads


class Server:
    """Answers each request once it is let go, with a row for each name."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.answer: Callable[[list[str]], list[Any]] = list

    async def ask(self, names: list[str]) -> list[Any]:
        self.requests.append(names)
        await self.go.wait()
        return self.answer(names)


async def read_all(reads: NamedReads, server: Server, *names: list[str], most: int = 200) -> list[asyncio.Task[Any]]:
    """Begin a read for each list of names, the first of which is under way then."""
    server.go.clear()
    tasks = [asyncio.create_task(reads.read(some, server.ask, most)) for some in names]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_a_read_alone_is_one_request():
    server = Server()
    assert await NamedReads().read(["a", "b"], server.ask, 200) == ["a", "b"]
    assert server.requests == [["a", "b"]]


async def test_reads_during_a_request_share_the_next_one():
    server, reads = Server(), NamedReads()
    tasks = await read_all(reads, server, ["a"], ["b"], ["c", "b"])
    server.go.set()
    first, second, third = await asyncio.gather(*tasks)
    assert server.requests == [["a"], ["b", "c"]]
    assert (first, {*second} >= {"b"}, {*third} >= {"b", "c"}) == (["a"], True, True)


async def test_a_request_has_a_bounded_number_of_names():
    server, reads = Server(), NamedReads()
    many = [[f"{caller} {number}" for number in range(NAMES_AT_ONCE // 2)] for caller in range(5)]
    tasks = await read_all(reads, server, ["a"], *many, most=10_000)
    server.go.set()
    await asyncio.gather(*tasks)
    assert [len(names) for names in server.requests] == [1, NAMES_AT_ONCE, NAMES_AT_ONCE, NAMES_AT_ONCE // 2]


async def test_an_answer_that_may_be_cut_is_asked_again():
    server, reads = Server(), NamedReads()
    server.answer = lambda names: names[:2]
    tasks = await read_all(reads, server, ["a"], ["b"], ["c", "d"], most=2)
    server.go.set()
    assert await asyncio.gather(*tasks) == [["a"], ["b"], ["c", "d"]]


async def test_an_error_reaches_all_who_share_a_request():
    server, reads = Server(), NamedReads()
    tasks = await read_all(reads, server, ["a"], ["b"], ["c"])

    def refuse(names: list[str]) -> list[Any]:
        raise OSError(str(names))

    server.answer = refuse
    server.go.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["['a']", "['b', 'c']", "['b', 'c']"]
    server.answer = list
    assert await reads.read(["d"], server.ask, 200) == ["d"]


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_a_cancelled_caller_leaves_others_their_answers(cancelled: int):
    server, reads = Server(), NamedReads()
    tasks = await read_all(reads, server, ["a"], ["b"], ["c"])
    tasks[cancelled].cancel()
    server.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers.pop(cancelled), asyncio.CancelledError)
    wanted = ["a", "b", "c"]
    del wanted[cancelled]
    assert all(name in answer for name, answer in zip(wanted, answers, strict=True))
    assert await reads.read(["d"], server.ask, 200) == ["d"]


async def test_a_cancelled_caller_passes_its_turn_on():
    server, reads = Server(), NamedReads()
    tasks = await read_all(reads, server, ["a"], ["b"], ["c"])
    server.go.set()
    while not tasks[0].done():
        await asyncio.sleep(0)
    tasks[1].cancel()
    assert "c" in await asyncio.wait_for(tasks[2], 5)
