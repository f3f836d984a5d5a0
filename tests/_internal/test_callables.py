"""One async implementation that sync code can call."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

import pytest
from prefect import flow, task

from prefect_crew._internal.callables import dual, in_async_context, sync_version

here: ContextVar[str] = ContextVar("here", default="nowhere")


@dual
async def answer(question: str = "?") -> str:
    """Say where it was asked."""
    await asyncio.sleep(0)
    return f"{question} {here.get()}"


def test_plain_sync_code_gets_the_result():
    token = here.set("a script")
    try:
        assert answer("who?") == "who? a script"
    finally:
        here.reset(token)
    assert not in_async_context()


async def test_plain_async_code_gets_an_awaitable():
    assert in_async_context()
    assert await answer("who?") == "who? nowhere"


async def test_a_thread_without_a_loop_gets_the_result():
    assert await asyncio.to_thread(answer, "who?") == "who? nowhere"


def test_a_loop_that_runs_is_not_blocked_without_a_word():
    async def arun_it() -> str:
        return "done"

    run_it = sync_version(arun_it)
    assert (run_it.__name__, run_it()) == ("run_it", "done")

    async def blocked() -> None:
        run_it()

    with pytest.raises(RuntimeError, match=r"run_it\(\) would block .* `await arun_it\(\.\.\.\)`"):
        asyncio.run(blocked())


@pytest.mark.usefixtures("prefect_api")
def test_flows_and_tasks_get_what_their_kind_can_use():
    got: dict[str, Any] = {}

    @task
    def sync_task() -> None:
        got["sync task"] = answer("sync task")

    @task
    async def async_task() -> None:
        got["async task"] = await answer("async task")

    @flow
    def sync_subflow() -> None:
        # The loop of the async flow around it is busy with it.
        got["sync subflow"] = answer("sync subflow")
        got["thread"] = threading.current_thread() is threading.main_thread()

    @flow
    async def async_flow() -> None:
        here.set("within")
        got["async flow"] = await answer("async flow")
        sync_task()
        await async_task()
        sync_subflow()
        got["helper"] = await asyncio.to_thread(answer, "helper")

    asyncio.run(async_flow())
    assert got.pop("thread")
    assert got == {name: f"{name} within" for name in got}
    assert len(got) == 5
