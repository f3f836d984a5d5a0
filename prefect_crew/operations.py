"""Flows to deploy as they are: a batch of a file, and recovery from crashes.

Each is asynchronous and has plain values as parameters, so that any work pool can run it by its import path, such as
`prefect_crew.operations.batch_file`, where this package is installed.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from prefect_crew._internal.prefect_errors import naming_prefect_errors
from prefect_crew.batches.run import arun_batch
from prefect_crew.exceptions import ConfigurationError


@flow(flow_run_name="{name}")
async def batch_file(
    crew: str, dataset: str, name: str, export: str, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run a crew once for each row of a file. A retry or the next scheduled call goes on where the batch stopped.

    Args:
        crew: The name of the crew's block, as under Blocks.
        dataset: The file: a path, a URL, or any fsspec address. Or the rows of a query: sql://BLOCK?query=….
        name: The batch's name. On a schedule: leads-{scheduled_start:%Y-%m-%d}.
        export: The address of the results. On a schedule, with the same placeholder.
        options: More of run_batch's options, such as {"max_in_flight": 500, "key": "id", "wait": {"timeout": 600}}.
    """
    report = await arun_batch(crew, dataset, name=name, export=export, **(options or {}))
    report.raise_for_failures()
    return report.as_dict()


@flow(flow_run_name="recover {flow_run_id}", retries=3, retry_delay_seconds=10)
async def recover(flow_run_id: UUID, max_attempts: int = 3) -> str:
    """Begin a crashed flow run again, if it has attempts left, and return the outcome. An automation runs this flow.

    The flow run keeps its id, so it reattaches to its crews' runs. A failed flow run stays as it is, since a new begin
    would start its crew again. Prefect alone can schedule a crashed flow run again, but without a limit, so a flow that
    kills its worker would do so for ever.

    Args:
        flow_run_id: The flow run that crashed.
        max_attempts: The number of times that it may begin in all, with the first time: each time ends with a crash.
    """
    with naming_prefect_errors(f"Recover flow run {flow_run_id} again: if it is scheduled by now, it is left alone."):
        async with get_client() as client:
            try:
                run = await client.read_flow_run(flow_run_id)
            except ObjectNotFound:
                raise ConfigurationError(f"There is no flow run {flow_run_id}. Nothing was scheduled.") from None
            # Not `run_count`: Prefect counts no run that dies before it begins, and up to 3.9.2 the answer to a form.
            states = await client.read_flow_run_states(flow_run_id)
            attempts = sum(state.type is StateType.CRASHED for state in states)
            if run.state is None or not run.state.is_crashed():
                done = f"left alone, it is {run.state.name if run.state else 'without a state'}"
            elif run.deployment_id is None:
                done = "left alone, no deployment can run it: its parent or its caller has to"
            elif attempts >= max_attempts:
                done = f"given up after {attempts} attempts; prefect flow-run retry {flow_run_id} makes another"
            else:
                done = f"scheduled again, attempt {attempts + 1} of {max_attempts}"
                again = Scheduled(message=f"Recovered from a crash: attempt {attempts + 1} of {max_attempts}")
                answer = await client.set_flow_run_state(flow_run_id, again)
                if answer.status is not SetStateStatus.ACCEPT:
                    done = f"left alone, Prefect did not take it: {getattr(answer.details, 'reason', answer.status)}"
    get_run_logger().info("Flow run %s: %s", flow_run_id, done)
    return done
