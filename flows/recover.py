"""Bring crashed flow runs back, a limited number of times: what an automation on Crashed runs.

Prefect can schedule a crashed run again by an automation alone, but without an end: a flow that kills its worker would
crash for ever. This flow counts. It touches crashes only: a run that failed, because its crew failed or for any other
reason, is left as it is, since that would start its crew again.
"""

from __future__ import annotations

from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Scheduled


@flow(flow_run_name="recover {flow_run_id}", retries=3, retry_delay_seconds=10)
async def recover(flow_run_id: UUID, max_attempts: int = 3) -> str:
    """Schedule a crashed flow run again, if it has attempts left, and say what was done.

    The run keeps its id, so it reattaches to its crews' runs: those in flight are waited for.

    Args:
        flow_run_id: The flow run that crashed.
        max_attempts: How often that flow run may be begun in all, the first time included.
    """
    done = await _recover(flow_run_id, max_attempts)
    get_run_logger().info("Flow run %s: %s", flow_run_id, done)
    return done


async def _recover(flow_run_id: UUID, max_attempts: int) -> str:
    async with get_client() as client:
        run = await client.read_flow_run(flow_run_id)
        if run.state is None or not run.state.is_crashed():
            return f"left alone, it is {run.state.name if run.state else 'without a state'}"
        if run.deployment_id is None:
            return "left alone, no deployment can run it: its parent or its caller has to"
        # A run that dies before it begins is never counted by Prefect, so its crashes count as well.
        states = await client.read_flow_run_states(flow_run_id)
        attempts = max(run.run_count, sum(state.type is StateType.CRASHED for state in states))
        if attempts >= max_attempts:
            return f"given up after {attempts} attempts; prefect flow-run retry {flow_run_id} makes another"
        again = Scheduled(message=f"Recovered from a crash: attempt {attempts + 1} of {max_attempts}")
        answer = await client.set_flow_run_state(flow_run_id, again)
        if answer.status is not SetStateStatus.ACCEPT:
            return f"left alone, Prefect did not take it: {getattr(answer.details, 'reason', answer.status)}"
        return f"scheduled again, attempt {attempts + 1} of {max_attempts}"
