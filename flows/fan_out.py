"""A crew over a list of inputs, in plain Prefect: a task for each row, Prefect's retries, and a limit at once.

Written twice, sync and async, as one would by hand. For hundreds of rows and more there is `run_batch`.

A row needs no idempotency key: it gets one made of this flow run and its inputs, so that a retry of the flow run finds
each
row's run again. A *task's* retry after a failed crew is an order for another run, which costs; hence `buy_again`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prefect import flow, task
from prefect.artifacts import acreate_table_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_crew import CrewResult, arun_crew, run_crew

EIGHT_AT_ONCE: Any = ThreadPoolTaskRunner(max_workers=8)


@task(task_run_name="row {number}", cache_policy=NO_CACHE, retry_delay_seconds=10)
def run_row(number: int, crew: str, inputs: dict[str, Any]) -> CrewResult:
    """Run the crew for one row."""
    return run_crew(crew, inputs)


@flow(flow_run_name="{crew}", task_runner=EIGHT_AT_ONCE)
def fan_out(crew: str, rows: list[dict[str, Any]], buy_again: int = 0) -> list[str]:
    """Run a crew for each row, eight at once, and return the outputs in the order of the rows.

    Args:
        crew: The name of the crew's block, as under Blocks.
        rows: The crew's inputs, once for each run.
        buy_again: How often a row whose crew failed is bought again.
    """
    row = run_row.with_options(retries=buy_again)
    futures = [row.submit(number, crew, inputs) for number, inputs in enumerate(rows, 1)]
    outcomes = [future.result(raise_on_failure=False) for future in futures]
    create_table_artifact(table(outcomes), key="fan-out", description=f"{crew}: {len(rows)} rows")
    return outputs(outcomes)


@task(task_run_name="row {number}", cache_policy=NO_CACHE, retry_delay_seconds=10)
async def arun_row(number: int, crew: str, inputs: dict[str, Any]) -> CrewResult:
    """Run the crew for one row."""
    return await arun_crew(crew, inputs)


@flow(flow_run_name="{crew}")
async def fan_out_async(crew: str, rows: list[dict[str, Any]], at_once: int = 8, buy_again: int = 0) -> list[str]:
    """Run a crew for each row and return the outputs in the order of the rows.

    Args:
        crew: The name of the crew's block, as under Blocks.
        rows: The crew's inputs, once for each run.
        at_once: How many runs may be in flight.
        buy_again: How often a row whose crew failed is bought again.
    """
    row = arun_row.with_options(retries=buy_again)
    free = asyncio.Semaphore(at_once)

    async def limited(number: int, inputs: dict[str, Any]) -> CrewResult:
        async with free:
            return await row(number, crew, inputs)

    runs = [limited(number, inputs) for number, inputs in enumerate(rows, 1)]
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    await acreate_table_artifact(table(outcomes), key="fan-out", description=f"{crew}: {len(rows)} rows")
    return outputs(outcomes)


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


def outputs(outcomes: Sequence[CrewResult | BaseException]) -> list[str]:
    """Return what every row gave, or fail with the rows that gave nothing."""
    failed = {number: error for number, error in enumerate(outcomes, 1) if not isinstance(error, CrewResult)}
    if failed:
        number, error = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} rows failed: {', '.join(map(str, failed))}. Row {number}: {error} "
            "A retry of this flow run keeps what was bought and buys the failed rows again."
        )
    return [outcome.output for outcome in outcomes if isinstance(outcome, CrewResult)]
