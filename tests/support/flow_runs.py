"""Calls in a flow of the test's own."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from prefect import flow
from prefect.runtime import flow_run


async def acall_in_flow(call: Callable[[], Awaitable[Any]], **options: Any) -> tuple[str, Any]:
    """Call something in a flow; return the id of the flow run, and what the call returned."""
    ids: list[str] = []

    @flow(**options)
    async def trip() -> Any:
        ids.append(str(flow_run.id))
        return await call()

    result = await trip()
    return ids[0], result


def call_in_flow(call: Callable[[], Awaitable[Any]], **options: Any) -> tuple[str, Any]:
    return asyncio.run(acall_in_flow(call, **options))
