"""The flow runs of a work pool of type `crew`: their way back to the pool, the stop of their crews, and the import of
their flows."""

from __future__ import annotations

import asyncio
import importlib
import shlex
from collections.abc import Iterable
from typing import Any, cast

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry, Cancelled
from prefect.utilities.engine import propose_state

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.blocks import find_crew
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import cancel_command, open_runs_of, stop_run
from prefect_crew.store.decision import Attempt

STOPS_AT_ONCE = 10
"""The most `/stop` requests at the same time for the crews of one flow run."""


async def hand_over(client: PrefectClient, flow_run: FlowRun, why: str) -> None:
    """Give a flow run that has not ended back to its pool, which hands it out again. `why` is its state's message.

    One that is scheduled or suspended keeps its state. The policy changes first: a pool hands out no flow run that
    waits for a retry "in process", and the server counts a change of workers as a failed attempt.
    """
    state, policy = flow_run.state, flow_run.empirical_policy
    if state is None or state.is_final():
        return
    update: dict[str, Any] = {"retry_type": "reschedule"}
    if state.is_scheduled() or (state.is_paused() and state.state_details.pause_reschedule):
        if policy.retry_type == "in_process":
            await client.update_flow_run(flow_run.id, empirical_policy=policy.model_copy(update=update))
        return
    update["retries"] = policy.retries and policy.retries + 1
    await client.update_flow_run(flow_run.id, empirical_policy=policy.model_copy(update=update))
    await propose_state(client, AwaitingRetry(message=why), flow_run_id=flow_run.id)


async def end_cancelled(client: PrefectClient, flow_run: FlowRun) -> None:
    """End a flow run that somebody has cancelled.

    Its own coroutine stops the crew that it waits for. This stops the crews that an earlier attempt started, if the
    coroutine did not reach their waits, or does not exist.
    """
    await stop_crews_of(client, flow_run)
    if flow_run.state is not None and flow_run.state.is_cancelling():
        await client.set_flow_run_state(flow_run.id, Cancelled(message="Flow run was cancelled."), force=True)


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
