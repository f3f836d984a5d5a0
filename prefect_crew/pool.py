"""The flow runs of a work pool of type `crew` on the Prefect server: their owners, their way back to the pool, the stop
of their crews, and the import of their flows.

The `infrastructure_pid` of a flow run has the name of its worker and the number of that worker's start.
"""

from __future__ import annotations

import asyncio
import importlib
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    Operator,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, FlowRunPolicy, State, StateType, WorkerStatus
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry
from prefect.utilities.engine import propose_state

from prefect_crew._internal.prefect_api import read_all
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.blocks import find_crew
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import cancel_command, open_runs_of, stop_run
from prefect_crew.store.decision import Attempt

UNOWNED_FOR = 60.0
"""Seconds for which a flow run may be Pending, or between two owners, before it counts as left behind: the worker that
takes it writes its name right after, and until then the flow run may have the name of an earlier owner."""
HANDED_OVER = "handed over"
"""The `infrastructure_pid` of a flow run that was given back to its pool: it is no worker's name."""
PAGE = 200
"""The most flow runs in one answer of the server."""
STOPS_AT_ONCE = 10
"""The most `/stop` requests at the same time for the crews of one flow run."""
CANCELLING = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
SUSPENDED_NAMES = ["Suspended", "Resuming"]
"""States in which the coroutine of a flow run has to end: somebody suspended the flow run, and may have resumed it
since. A Paused flow run waits in its coroutine, for a form or for the end of `pause_flow_run`."""
BEGUN = FlowRunFilterState(
    operator=Operator.or_,  # pyright: ignore[reportCallIssue]
    type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.PAUSED]),
    name=FlowRunFilterStateName(any_=["AwaitingRetry"]),
)


async def read_flow_runs(client: PrefectClient, pool: str, state: FlowRunFilterState) -> list[FlowRun]:
    """Return the flow runs of a pool that match a state filter."""
    of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    return await read_all(client.read_flow_runs, flow_run_filter=FlowRunFilter(state=state), work_pool_filter=of_pool)


async def read_workers(client: PrefectClient, pool: str) -> dict[str, bool]:
    """Return for each worker of a pool, by its name, whether it is online."""
    workers = await client.read_workers_for_work_pool(pool)
    return {worker.name: worker.status == WorkerStatus.ONLINE for worker in workers}


def worker_name(infrastructure_pid: str | None) -> str | None:
    """Return the name of the worker in an `infrastructure_pid`, or None."""
    name, slash, _ = (infrastructure_pid or "").rpartition("/")
    return name if slash else None


def is_suspended(state: State[Any]) -> bool:
    """Return whether a flow run in this state needs no worker until somebody resumes it."""
    return state.is_paused() and bool(state.state_details.pause_reschedule)


def is_running(flow_run: FlowRun) -> bool:
    """Return whether the state of a flow run is Running."""
    return flow_run.state is not None and flow_run.state.is_running()


def is_left(flow_run: FlowRun, workers: Mapping[str, bool]) -> bool:
    """Return whether a flow run that has begun needs a worker and has none, because its own worker is not online."""
    state, name = flow_run.state, worker_name(flow_run.infrastructure_pid)
    if state is None or is_suspended(state):
        return False
    if state.is_scheduled() and flow_run.empirical_policy.retry_type != "in_process":
        return False  # the pool will hand it out
    if name is None:
        # Between two owners. If it is not Pending, its worker has died while it gave the flow run back.
        return state.is_pending() or flow_run.infrastructure_pid == HANDED_OVER
    return not workers.get(name, False)


def one_retry_more(flow_run: FlowRun) -> FlowRunPolicy:
    """Return a flow run's policy with one retry more, if it has retries.

    The server counts a change of owners as a failed attempt.
    """
    policy = flow_run.empirical_policy
    return policy.model_copy(update={"retries": policy.retries and policy.retries + 1})


async def hand_over(client: PrefectClient, flow_run_id: UUID, why: str, *, only_from: UUID | None = None) -> bool:
    """Give a flow run back to its pool, which hands it out again. Return whether this was done.

    Return False if the flow run has ended, is suspended, belongs to the pool already, or is not in the state
    `only_from` any more. `why` is the message of its new state.

    A pool hands out no flow run that waits for a retry "in process", so this changes the policy first.
    """
    flow_run = await client.read_flow_run(flow_run_id)
    state = flow_run.state
    if state is None or state.is_final() or is_suspended(state) or only_from not in (None, state.id):
        return False
    retry_at = None
    if state.is_scheduled():
        if flow_run.empirical_policy.retry_type != "in_process":
            return False
        retry_at = state.state_details.scheduled_time
    policy = one_retry_more(flow_run).model_copy(update={"retry_type": "reschedule"})
    await client.update_flow_run(flow_run_id, empirical_policy=policy, infrastructure_pid=HANDED_OVER)
    await propose_state(client, AwaitingRetry(message=why, scheduled_time=retry_at), flow_run_id=flow_run_id)
    return True


async def stop_crews_of(client: PrefectClient, flow_run: FlowRun) -> None:
    """Stop the crews whose runs a flow run or its subflows started. A second call sends no second `/stop`.

    The flow run of a batch stops the runs of its rows itself; `prefect-crew batch cancel` stops them too.
    """
    log, limit = flow_run_logger(flow_run), asyncio.Semaphore(STOPS_AT_ONCE)

    async def stop(attempt: Attempt) -> None:
        if attempt.first_id is None:
            log.warning(
                "The kickoff of run %r is uncertain. If it started a run, the run continues at %s. Look at the crew's "
                "page, then run: prefect-crew runs resolve %s --kickoff-id ID, or --never-started.",
                *(attempt.key, attempt.crew_url, shlex.quote(attempt.key)),
            )
            return
        try:
            crew = await find_crew(attempt)
            if crew is None:
                raise ConfigurationError(f"no block {attempt.crew!r} has its address")
            async with limit:
                # A wait of the flow run that has survived it may stop the crew at the same moment.
                answer = await stop_run(LiveRun(crew, attempt.first_id, attempt), is_repeated=False)
            text = "Crew run %s was asked to stop. The answer of the crew's server: %s."
            log.info(text, attempt.first_id, answer.outcome)
        except (CrewError, *PREFECT_ERRORS) as error:
            text = "Crew run %s could not be stopped (%s): it continues at %s. To stop the crew, run: %s"
            log.warning(text, attempt.first_id, error, attempt.crew_url, cancel_command(attempt))

    open_runs = await open_runs_of(client, flow_run)
    await asyncio.gather(*(stop(attempt) for attempt in open_runs if attempt.stop_asked_at is None))


def load_flow(entrypoint: str | None, *, allowed: Iterable[str]) -> Flow[..., Any]:
    """Import an asynchronous flow by its path, such as `my_package.flows.my_flow`.

    `allowed` are the allowed modules in addition to this package's, each with its submodules.

    Raises:
        ConfigurationError: The path is no import path, is not allowed, cannot be imported, or is no asynchronous flow.
    """
    module, _, name = (entrypoint or "").rpartition(".")
    if not module or not {":", "/"}.isdisjoint(entrypoint or ""):
        raise ConfigurationError(
            f"{entrypoint!r} is not an import path of a flow, such as my_package.flows.my_flow. Deploy a flow in a "
            "file to a process work pool with prefect deploy."
        )
    permitted = ["prefect_crew", *allowed]
    if not any(module == package or module.startswith(f"{package}.") for package in permitted):
        raise ConfigurationError(
            f"This crew worker is not allowed to import {module}. Add it to PREFECT_INTEGRATIONS_CREW_WORKER_MODULES "
            f"where the worker starts. Allowed: {', '.join(permitted)}."
        )
    try:
        flow = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        reason = f"{error}" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigurationError(
            f"The flow {entrypoint} cannot be imported ({reason}). Install its package here and where the worker runs."
        ) from error
    if not isinstance(flow, Flow):
        raise ConfigurationError(f"{entrypoint} is not a flow. Decorate the function with @flow.")
    if flow.isgenerator:
        raise ConfigurationError(
            f"The flow {entrypoint} is a generator, but a crew worker only runs flows that return. Return the values "
            "in a list, or deploy the flow to a process work pool with prefect deploy."
        )
    if not flow.isasync:
        raise ConfigurationError(
            f"The flow {entrypoint} is synchronous, but a crew worker only runs asynchronous flows. Write it as "
            "`async def`, or deploy it to a process work pool with prefect deploy."
        )
    return cast("Flow[..., Any]", flow)
