"""A cancellation is neither lost nor made twice."""

import asyncio
import contextlib
import contextvars
import signal
import subprocess
import sys
from typing import Any

import pytest
from prefect import flow
from prefect.context import FlowRunContext

from prefect_crew._internal.asyncio_tasks import OwnTask, cancel_and_wait, sync_version
from prefect_crew.exceptions import ConfigurationError
from support.waiting import LIMIT


async def test_a_cancelled_task_may_finish():
    finishing, finished = asyncio.Event(), asyncio.Event()
    cancellations: list[int] = []

    async def post() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            finishing.set()
            try:
                await finished.wait()
            except asyncio.CancelledError:
                cancellations.append(2)
            raise

    async def fail() -> None:
        raise ValueError("of its own")

    tasks = [asyncio.ensure_future(work) for work in (post(), fail())]
    await asyncio.sleep(0)
    ending = asyncio.ensure_future(cancel_and_wait(*tasks))
    await finishing.wait()
    await asyncio.sleep(0.01)
    assert not ending.done(), "it waits until all have ended"
    ending.cancel()
    await asyncio.sleep(0.01)
    assert cancellations == []
    finished.set()
    await cancel_and_wait(*tasks)
    assert tasks[0].cancelled()
    await cancel_and_wait()


NESTED = """
import asyncio, contextvars, os, signal, threading
from prefect_crew._internal.asyncio_tasks import run_sync

kept = contextvars.ContextVar("kept")

async def wait():
    assert kept.get()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        await asyncio.sleep(60)
    finally:
        print("stopped")

async def outer():
    kept.set(True)
    assert run_sync(asyncio.sleep(0, "done")) == "done"
    run_sync(wait())

asyncio.run(outer())
"""


def test_ctrl_c_ends_a_nested_sync_wait():
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "stopped\n", done.stderr


async def test_a_cancelled_coroutine_finishes_by_itself():
    for limit, is_waited_for in ((0.05, False), (LIMIT, True)):
        begun, may_finish, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def start(begun: asyncio.Event, may_finish: asyncio.Event, finished: asyncio.Event) -> None:
            try:
                begun.set()
                await asyncio.sleep(60)
            finally:
                await may_finish.wait()
                finished.set()

        running = asyncio.ensure_future(OwnTask().run(start(begun, may_finish, finished), within=limit))
        await begun.wait()
        running.cancel()
        if is_waited_for:
            asyncio.get_running_loop().call_later(0.1, may_finish.set)
        with pytest.raises(asyncio.CancelledError):
            await running
        assert finished.is_set() is is_waited_for
        may_finish.set()
        await finished.wait()


async def aplan() -> str:
    return kept.get()


kept = contextvars.ContextVar("kept", default="")


@pytest.mark.parametrize(
    ("around", "blocks"),
    [(None, True), (flow(aplan), True), (flow(lambda: None, name="plan"), False)],
    ids=["no flow", "async flow", "sync flow"],
)
async def test_a_sync_version_blocks_no_loop_that_can_await(around: Any, blocks: bool):
    """A sync flow that an async flow has called cannot await. Its coroutine has the context variables."""
    kept.set("kept")
    context = FlowRunContext.model_construct(flow=around) if around else contextlib.nullcontext()
    with context, pytest.raises(ConfigurationError, match="`await aplan") if blocks else contextlib.nullcontext():
        assert sync_version(aplan)() == "kept"
