"""Flow runs of a pool of crew workers that have lost their worker, as the Prefect server knows it, and their ends.

Apart from the worker itself, whose import takes longer: `prefect-crew doctor` looks as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.exceptions import PrefectException
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry
from prefect.utilities.engine import propose_state

from prefect_crew.actions import stop_run
from prefect_crew.api.errors import ConfigurationError, CrewError
from prefect_crew.blocks import find_crew
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RecordPhase
from prefect_crew.stopping import stop_was_asked

__all__ = [
    "CANCELLING",
    "HANDED_OVER",
    "PAGE",
    "begun_flow_runs",
    "flow_runs_of",
    "hand_over",
    "is_orphan",
    "owner_name",
    "stop_crews_of",
    "workers_of",
]

HANDED_OVER = "handed over"
"""What stands in `infrastructure_pid` of a flow run that went back to its pool: no worker's name."""
PAGE = 200
"""Flow runs that the server gives at once, at most."""


def _types(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


CANCELLING = _types(StateType.CANCELLING)
STARTED = _types(StateType.RUNNING, StateType.PENDING, StateType.PAUSED)
RETRYING = FlowRunFilterState(name=FlowRunFilterStateName(any_=["AwaitingRetry"]))


async def flow_runs_of(client: PrefectClient, pool: str, state: FlowRunFilterState) -> list[FlowRun]:
    """Return the flow runs of a pool in a kind of state."""
    found: list[FlowRun] = []
    while True:
        page = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=state),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


async def begun_flow_runs(client: PrefectClient, pool: str) -> list[FlowRun]:
    """Return the flow runs of a pool that have begun and not ended, those that wait for a retry among them."""
    return [*await flow_runs_of(client, pool, STARTED), *await flow_runs_of(client, pool, RETRYING)]


async def workers_of(client: PrefectClient, pool: str) -> dict[str, bool]:
    """Return the workers of a pool by their names, and whether each is online."""
    workers = await client.read_workers_for_work_pool(pool)
    return {worker.name: worker.status == WorkerStatus.ONLINE for worker in workers}


def owner_name(flow_run: FlowRun) -> str | None:
    """Return the worker that has, or had, a flow run; None where none has named itself."""
    name, slash, _ = (flow_run.infrastructure_pid or "").rpartition("/")
    return name if slash else None


def is_orphan(flow_run: FlowRun, workers: Mapping[str, bool]) -> bool:
    """Return whether a flow run that has begun needs a worker and has none: its own is not among those online."""
    state, name = flow_run.state, owner_name(flow_run)
    if state is None or (state.is_paused() and state.state_details.pause_reschedule):
        return False  # suspended: nobody holds it
    if state.is_scheduled() and flow_run.empirical_policy.retry_type != "in_process":
        return False  # the pool hands it out
    if name is None:
        # Between two owners. Where it is not Pending, its worker has died while it handed the flow run over.
        return state.is_pending() or flow_run.infrastructure_pid == HANDED_OVER
    return not workers.get(name, False)


async def hand_over(client: PrefectClient, flow_run_id: UUID, why: str, *, only_from: UUID | None = None) -> bool:
    """Give a flow run back to its pool, which hands it out again; return whether that was done.

    It is not where the flow run is in another state, has ended, or is the pool's already.

    A flow run that waits for a retry "in process" is handed out by no pool: so its policy is changed first. Being
    handed over is no attempt that failed, but the server counts it as one: so there is one retry more.

    Args:
        client: A Prefect client.
        flow_run_id: The flow run.
        why: The message of its new state.
        only_from: The id of the state that it must be in.
    """
    flow_run = await client.read_flow_run(flow_run_id)
    state, policy = flow_run.state, flow_run.empirical_policy
    if state is None or state.is_final() or only_from not in (None, state.id):
        return False
    retry_at = None
    if state.is_scheduled():
        if policy.retry_type != "in_process":
            return False
        retry_at = state.state_details.scheduled_time
    policy = policy.model_copy(update={"retry_type": "reschedule", "retries": policy.retries and policy.retries + 1})
    await client.update_flow_run(flow_run_id, empirical_policy=policy, infrastructure_pid=HANDED_OVER)
    await propose_state(client, AwaitingRetry(message=why, scheduled_time=retry_at), flow_run_id=flow_run_id)
    return True


async def stop_crews_of(client: PrefectClient, flow_run: FlowRun) -> None:
    """Stop the crews whose runs a flow run, or a subflow of it, has started and nobody else waits for.

    Rows of a batch are in its ledger, not here: `prefect-crew batch cancel` stops those.
    """
    records = PrefectRecords()
    ids = {str(one) for one in await _with_subflows(client, flow_run.id)}
    log = flow_run_logger(flow_run)
    async for record in records.all():
        if record.flow_run_id not in ids or record.phase not in (RecordPhase.STARTED, RecordPhase.UNCERTAIN):
            continue
        if stop_was_asked(record):
            continue
        if record.kickoff_id is None:
            text = "The kickoff of run %r is uncertain: a run that it started runs on at %s."
            log.warning(text, record.run_key, record.crew_url)
            continue
        if others := await records.other_waiters(record, record.flow_run_id):
            log.warning("Crew run %s runs on: flow run %s waits for it too.", record.kickoff_id, ", ".join(others))
            continue
        try:
            crew = await find_crew(record)
            if crew is None:
                raise ConfigurationError(f"no block {record.crew!r} has its address")
            answer = await stop_run(crew, record.kickoff_id, run_key=record.run_key)
        except (CrewError, httpx.HTTPError, PrefectException) as error:
            log.warning(
                "Crew run %s could not be stopped (%s): it runs on at %s.", record.kickoff_id, error, record.crew_url
            )
        else:
            log.info("Crew run %s was asked to stop: %s.", record.kickoff_id, answer.outcome)


async def _with_subflows(client: PrefectClient, flow_run_id: UUID) -> list[UUID]:
    found, at = [flow_run_id], 0
    while at < len(found):
        parents = FlowRunFilterParentFlowRunId(any_=found[at:])
        at = len(found)
        found += [
            one.id for one in await client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parents))
        ]
    return found
