"""A crew over a list of inputs, in plain Prefect: a task for each row, Prefect's retries, and a limit at once.

For hundreds of rows and more there is `run_batch`. A row needs no idempotency key: it gets one made of this flow run
and its inputs, so that a retry of the flow run finds each row's run again. A *task's* retry after a failed crew starts
another run, which costs; so `retries` is 0 unless it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prefect import flow, task
from prefect.artifacts import acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from prefect_crew import CrewResult, arun_crew


@task(task_run_name="row {number}", cache_policy=NO_CACHE, retry_delay_seconds=10)
async def run_row(number: int, crew: str, inputs: dict[str, Any]) -> CrewResult:
    """Run the crew for one row."""
    return await arun_crew(crew, inputs)


@flow(flow_run_name="{crew}")
async def fan_out(crew: str, rows: list[dict[str, Any]], max_in_flight: int = 8, retries: int = 0) -> list[str]:
    """Run a crew for each row and return the outputs in the order of the rows.

    Args:
        crew: The name of the crew's block, as under Blocks.
        rows: The crew's inputs, once for each run.
        max_in_flight: How many runs may be in flight.
        retries: How often a row whose crew failed is started again.
    """
    row, slots = run_row.with_options(retries=retries), asyncio.Semaphore(max_in_flight)

    async def limited(number: int, inputs: dict[str, Any]) -> CrewResult:
        async with slots:
            return await row(number, crew, inputs)

    runs = [limited(number, inputs) for number, inputs in enumerate(rows, 1)]
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    await acreate_table_artifact(table(outcomes), key="fan-out", description=f"{crew}: {len(rows)} rows")
    failed = {number: error for number, error in enumerate(outcomes, 1) if not isinstance(error, CrewResult)}
    if failed:
        number, error = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} rows failed: {', '.join(map(str, failed))}. Row {number}: {error} "
            "A retry of this flow run keeps what has completed and starts the failed rows again."
        )
    return [outcome.output for outcome in outcomes if isinstance(outcome, CrewResult)]


def table(outcomes: Sequence[CrewResult | BaseException]) -> list[dict[str, Any]]:
    """Return a line for each row. The outputs stand on the runs' own artifacts, which know what may be shown."""
    lines: list[dict[str, Any]] = []
    for number, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, CrewResult):
            line = {"run": outcome.kickoff_id, "state": "completed", "seconds": outcome.execution_time, "error": ""}
        else:
            run = getattr(outcome, "kickoff_id", None) or ""
            line = {"run": run, "state": type(outcome).__name__, "seconds": None, "error": str(outcome)}
        lines.append({"row": number, **line})
    return lines
