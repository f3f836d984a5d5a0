"""A crew that runs when another one has completed, on that one's `crew.completed` event.

The event says which run it was, not what it gave: the result is read by its idempotency key. The key of the crew
here is made of that one, so that an event that comes twice starts one run.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from prefect_crew import aget_result, arun_crew


@flow(flow_run_name="{crew} after {after}")
async def follow_up(
    idempotency_key: str, after: str, crew: str, takes: str = "draft", inputs: dict[str, Any] | None = None
) -> str:
    """Read what a crew's run gave, hand it to another crew, and return what that one gives.

    Args:
        idempotency_key: The key of the run that has completed; its event has it in the payload.
        after: The block of the crew whose run that was.
        crew: The block of the crew to run now.
        takes: The input of that crew that gets the other's output.
        inputs: Its other inputs by name.
    """
    before = await aget_result(idempotency_key, crew=after)
    result = await arun_crew(
        crew, {**(inputs or {}), takes: before.output}, idempotency_key=f"{crew} after {idempotency_key}"
    )
    return result.output
