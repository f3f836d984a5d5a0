"""Which flow runs of a pool of crew workers have lost their worker, as it stands on the Prefect server.

Apart from the worker itself, whose import takes longer: `prefect-crew doctor` looks as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus

from prefect_crew._internal.flow_engine import HANDED_OVER

__all__ = ["CANCELLING", "PAGE", "begun_flow_runs", "flow_runs_of", "is_orphan", "owner_name", "workers_of"]

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
    if slash:
        return name
    label = flow_run.labels.get("prefect.worker.name")
    return None if label is None or flow_run.infrastructure_pid == HANDED_OVER else str(label)


def is_orphan(flow_run: FlowRun, workers: Mapping[str, bool]) -> bool:
    """Return whether a flow run that has begun needs a worker and has none: its own is not among those online."""
    state, name = flow_run.state, owner_name(flow_run)
    if state is None or (state.is_paused() and state.state_details.pause_reschedule):
        return False  # suspended: nobody holds it
    if state.is_scheduled() and flow_run.empirical_policy.retry_type != "in_process":
        return False  # the pool hands it out
    return state.is_pending() if name is None else not workers.get(name, False)
