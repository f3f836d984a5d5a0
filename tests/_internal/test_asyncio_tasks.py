"""A cancellation is neither lost nor made twice."""

import asyncio
import contextlib
import contextvars
from typing import Any

import pytest
from prefect import flow
from prefect.context import FlowRunContext

from prefect_crew._internal.asyncio_tasks import cancel_and_wait, sync_version
from prefect_crew.exceptions import ConfigurationError


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
