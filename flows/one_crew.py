"""One crew, by the name of its block: the flow to put on a schedule.

Deploy it as it is, or serve it from this file: python flows/one_crew.py
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from prefect_crew import arun_crew


@flow(flow_run_name="{crew}")
async def one_crew(crew: str, inputs: dict[str, Any], idempotency_key: str | None = None) -> str:
    """Run one crew and return its output.

    Args:
        crew: The name of the crew's block, as under Blocks.
        inputs: The crew's inputs by name; prefect-crew inputs CREW lists them.
        idempotency_key: The identity of one run. On a schedule: daily-{scheduled_start:%Y-%m-%d}, the time that it
            was scheduled for, in UTC. Empty: each flow run is one.
    """
    result = await arun_crew(crew, inputs, idempotency_key=idempotency_key)
    return result.output


if __name__ == "__main__":
    one_crew.serve(
        name="served",
        cron="0 6 * * *",
        parameters={
            "crew": "travel",
            "inputs": {"budget": "1000 USD", "interests": "food, museums", "duration": "3 days", "age": "35"},
            "idempotency_key": "served-{scheduled_start:%Y-%m-%d}",
        },
    )
