"""`run_crew`: run one crew and return its result, by tasks of the flow around the call, or in a flow of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast
from uuid import UUID

from prefect import flow
from prefect.context import AsyncClientContext, FlowRunContext, TaskRunContext
from prefect.tasks import TaskOptions
from pydantic import Field

from prefect_crew._internal.asyncio_tasks import ENDINGS, OwnTask, sync_version
from prefect_crew._internal.prefect_api import label_flow_run
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew.blocks import DeployedCrew, find_crew, load_crew, values_of_blocks
from prefect_crew.budgets import Budget
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult, Data
from prefect_crew.client.redaction import MASK
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import (
    ConfigurationError,
    CrewFailedError,
    CrewStoppedError,
    NoResultError,
)
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import scheduled_key
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.resolve import find_attempts, latest
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.run import LiveRun, StoredResult, parse_data, read_result
from prefect_crew.runs.stop import STOP_WITHIN, stop_if_asked
from prefect_crew.store import attempts
from prefect_crew.store.decision import AttemptState
from prefect_crew.tasks import tasks_of, under_budgets

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


STORED_BYTES = 400_000
"""The most bytes of inputs that are stored with a flow run: Prefect accepts 512 KiB of parameters."""
TOO_LARGE = "(too large to be stored with the flow run)"


_naming_prefect_away = naming_prefect_away(
    "Run again with the same key, which reattaches to a run that was started. Without a key of your own, first run: "
    "prefect-crew runs ls."
)


@_naming_prefect_away
async def arun_crew(
    crew: DeployedCrew | str,
    inputs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    idempotency_key: str | None = None,
    force_new: bool = False,
    meta: Mapping[str, Any] | None = None,
    wait: WaitPolicy | None = None,
    output_type: type[Data] | None = None,
    review: ReviewChoice | None = None,
    webhooks: Webhooks | None = None,
    restore_from: str | UUID | None = None,
    session: str | None = None,
    budgets: Sequence[Budget] = (),
    kickoff_options: TaskOptions | None = None,
    wait_options: TaskOptions | None = None,
) -> CrewResult[Data]:
    """Run a deployed crew and return its result. A run is started at most once.

    Inside a flow (or a task) the call runs tasks of that flow; outside of a flow, it runs a flow of its own. `run_crew`
    is for sync code, `arun_crew` for async code.

    Args:
        crew: A crew, or the name of a stored block.
        inputs: The crew's inputs by name.
        name: The step's name: in task names, and part of a derived idempotency key.
        idempotency_key: The identity of this run, across flow runs and machines that share a crew database. It may be a
            template over the scheduled time: `"daily-{scheduled_start:%Y-%m-%d}"`. Default: inside a flow, a key is
            derived, so that retries of this flow run reattach to the run; outside, every call is a new run.
        force_new: Start a new run, whatever attempts the key has.
        meta: Any JSON object for the crew's webhooks; the idempotency key is added to it.
        wait: How to wait, in place of the block's policy.
        output_type: A pydantic model; `result.data` is then an instance of the model.
        review: The source of answers when the crew waits for a person. "form" shows a form on the flow run's page. A
            function, sync or async, takes a ReviewRequest and returns a Review. Default: the wait goes on, and the log,
            the artifact and an event name the run that waits for a person and the commands that answer.
        webhooks: Your own targets for the crew's webhooks.
        restore_from: The id (a UUID) of a Flow state from which the run starts: the API's `restoreFromStateId`. Two
            calls with different states are different runs. If the API does not know the id, the run starts with an
            empty state and without an error.
        session: The name of a session of runs of one Flow. Each run is a turn: it starts from the state of the last
            completed turn, once the turn before has ended. A retry, or a call with the same key, finds its turn again.
        budgets: Limits for the total use of this run and all other runs under the same budgets, in addition to the
            block's. A budget without a name gets the flow's name, or outside of a flow the crew's name.
        kickoff_options: Prefect's options for the task that kicks the crew off, such as `{"retries": 5, "tags":
            ["night"]}`: all options of its `with_options` except caches, stored results and `retry_condition_fn`.
        wait_options: Prefect's options for the task that waits, such as `{"timeout_seconds": 600}`. After that timeout
            the crew goes on; `wait=WaitPolicy(timeout=600)` can stop it.

    Returns:
        The result: `output`, `data`, `tasks`, `usage`, `cost`, `kickoff_id`, `idempotency_key` and more.

    Raises:
        ConfigurationError: The sync version was called where an event loop runs, which it would block.
        InvalidInputsError, IdempotencyConflictError: Nothing was started.
        BudgetExceededError: A budget has no room for another run. Nothing was started.
        SessionBlockedError: An earlier turn of the session is uncertain or lost. Nothing was started.
        KickoffUncertainError: Nobody knows whether a run was started. A person has to resolve it.
        CrewFailedError, CrewStoppedError, CrewLostError: The run failed, was stopped, or its server has forgotten it.
        CrewTimeoutError: A time limit is over; the run may go on.
        OutputTypeError: The result does not fit `output_type`.
        PrefectAwayError: The Prefect API does not answer.
        CrewError: Any other failure of the crew's server.
    """
    own_inputs, inputs = Inputs.of(inputs), None  # no frame shows the values
    options = RunOptions.of(
        name=name,
        idempotency_key=idempotency_key,
        force_new=force_new,
        meta=meta,
        wait=wait,
        output_type=output_type,
        review=review,
        webhooks=webhooks,
        restore_from=restore_from,
        session=session,
        budgets=budgets,
        kickoff_options=kickoff_options,
        wait_options=wait_options,
    )
    tasks_of(options)  # checks the task options before a flow run begins
    loaded_crew = await load_crew(crew)
    if options.budgets:
        loaded_crew = under_budgets(loaded_crew, options.budgets)
    return await run_loaded_crew(loaded_crew, own_inputs, options)


@_naming_prefect_away
async def run_loaded_crew(crew: Crew, inputs: Mapping[str, Any] | Inputs, options: RunOptions) -> CrewResult[Any]:
    """Run a crew by tasks of the flow around this call; without a flow, in a flow of its own."""
    inputs = Inputs.of(inputs)  # before anything can raise: no frame shows the values
    request = RunRequest.of(crew, inputs, options)
    run = LiveRun(crew, request=request)
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await run_tasks(run)

    # This closure passes all of the call to the flow: Prefect must not or cannot store some of it as parameters.
    @wraps(run_deployed_crew.fn)
    async def call(*_: Any, **__: Any) -> CrewResult[Any]:
        return await run_tasks(run)

    own_flow = copy(run_deployed_crew)  # `with_options` would read the signature again, which takes 15 ms
    own_flow.fn, own_flow.flow_run_name = call, lambda: run.title  # a text would be a template
    stored = request.inputs.shown(run.redact)
    return await cast("Any", own_flow)(
        crew=crew.label,
        inputs=stored if len(json.dumps(stored)) <= STORED_BYTES else dict.fromkeys(stored, TOO_LARGE),
        name=options.name,
        idempotency_key=options.idempotency_key,
        force_new=options.force_new,
        wait=options.wait,
        review="form" if options.review == "form" else None,
        restore_from=options.restore_from,
        session=options.session,
    )


run_crew = sync_version(arun_crew)


async def run_tasks(run: LiveRun, *, wait_for: Sequence[Any] = ()) -> CrewResult[Any]:
    """Kick a crew off and wait for it, by tasks of the flow around this call. They take the live run as their crew.

    Prefect draws an arrow to the first task from each task in `wait_for`, and from each task whose result is an input.
    """
    request = run.request
    assert request is not None  # noqa: S101  its maker has set it
    kickoff_task, wait_task = tasks_of(request.options)
    # Without a shared client of Prefect on this event loop, each task would open and close its own.
    async with AsyncClientContext.get_or_create(), run.session:
        # The tasks have these in the live run; they are passed for a user's template of a task run's name.
        names = {"name": request.options.name, "idempotency_key": request.options.idempotency_key}
        try:
            kickoff_id = await kickoff_task.acall(run, request.inputs, **names, wait_for=wait_for or None)
            return await wait_task.acall(run, kickoff_id, **names)
        except ENDINGS:
            # The wait, which stops a cancelled crew, has not begun.
            if run.is_fresh and run.attempt is not None and run.attempt.state is AttemptState.STARTED:
                work = OwnTask()
                with work.uncut():  # a crew worker cancels again and again
                    await work.run(stop_if_asked(run), within=STOP_WITHIN)
            raise


@flow(name="deployed-crew", validate_parameters=True)  # the body names the flow run
async def run_deployed_crew(
    crew: Annotated[str, Field(description="The name of the crew's block, under Blocks.")],
    inputs: Annotated[
        dict[str, Any] | None,
        Field(description="The crew's inputs by name; for a secret input, the name of its Secret block."),
    ] = None,
    name: Annotated[
        str | None, Field(description="A name for the step, for task names and the idempotency key.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Field(description="The identity of one run, such as daily-{scheduled_start:%Y-%m-%d}."),
    ] = None,
    force_new: Annotated[bool, Field(description="Start a new run even if the key has one.")] = False,
    wait: Annotated[WaitPolicy | None, Field(description="How to wait, in place of the block's policy.")] = None,
    review: Annotated[
        Literal["form"] | None, Field(description="The place of questions to people: a form on this flow run's page.")
    ] = None,
    restore_from: Annotated[
        str | None, Field(description="The id (a UUID) of a saved state of a CrewAI Flow from which the run starts.")
    ] = None,
    session: Annotated[
        str | None,
        Field(description="The session of a CrewAI Flow: the run starts from the state of its last completed run."),
    ] = None,
) -> CrewResult:
    """Run one deployed crew. You can deploy this flow as it is; `run_crew` uses it outside of a flow."""
    try:
        stored = await load_crew(crew)
    except ValueError:
        await label_flow_run(name=crew)
        raise
    parameters = dict(inputs or {})
    missing = [key for key, value in parameters.items() if value in (MASK, TOO_LARGE)]
    if missing:
        raise ConfigurationError(
            f"The flow run does not store the inputs {', '.join(missing)}, which are secret or too large, so its "
            "parameters alone cannot start the crew. Call run_crew again with the same idempotency key: the call "
            "reattaches to a run in flight."
        )
    key = idempotency_key and await scheduled_key(idempotency_key, starts_anew=force_new)
    options = RunOptions.of(
        name=name,
        idempotency_key=key,
        force_new=force_new,
        wait=wait,
        review=review,
        restore_from=restore_from,
        session=session,
    )
    own_inputs = Inputs.of(await values_of_blocks(parameters, stored.secret_inputs))
    run = LiveRun(stored, request=RunRequest.of(stored, own_inputs, options))
    await label_flow_run(name=run.title)
    return await run_tasks(run)


@naming_prefect_away("The call reads the result from the crew database. Call it again.")
async def aget_result(
    idempotency_key: str, *, crew: DeployedCrew | str | None = None, output_type: type[Data] | None = None
) -> CrewResult[Data]:
    """Return the result of a completed run, on any machine that shares the crew database.

    `get_result` is for sync code, `aget_result` for async code.

    Args:
        idempotency_key: The run's key. If it has several attempts, the latest completed one counts. A kickoff id in its
            place selects one attempt.
        crew: Needed only if the result is not on record (the crew does not show it, it contains a secret input, or it
            is larger than 5 MB) and no block is stored under the crew's name.
        output_type: See `run_crew`.

    Raises:
        CrewLostError: The crew's server has forgotten the result.
        CrewFailedError, CrewStoppedError: The run failed or was stopped, so it has no result.
        CrewError: There is no such run, or it has not ended.
    """
    options = RunOptions.of(idempotency_key=idempotency_key, output_type=output_type)
    found = await find_attempts(idempotency_key)
    completed = [attempt for attempt in found if attempt.state is AttemptState.COMPLETED]
    attempt = completed[-1] if completed else latest(found)
    if attempt.first_id is None:
        raise NoResultError(
            f"Run {attempt.key!r} has no result: its kickoff is {attempt.state}. {attempt.error or ''}".strip()
        )
    body = await in_store(attempts.result_of, attempt.id)
    if body is not None:
        # The stored result is masked already.
        return parse_data(StoredResult.model_validate(body).result(attempt), options.output_type)
    block = await find_crew(attempt) if crew is None else await load_crew(crew)
    if block is None or block.url != attempt.crew_url:
        if attempt.state is AttemptState.FAILED:
            raise CrewFailedError(
                kickoff_id=attempt.first_id, crew=attempt.crew, idempotency_key=attempt.key, error=attempt.error or ""
            )
        if attempt.state is AttemptState.STOPPED:
            raise CrewStoppedError(kickoff_id=attempt.first_id, crew=attempt.crew, idempotency_key=attempt.key)
        raise ConfigurationError(
            f"The crew database does not hold the result of run {attempt.key!r}, and crew {attempt.crew} is not stored "
            f"with the URL {attempt.crew_url}. Give the crew: crew=… (--crew)."
        )
    run = LiveRun(block, attempt.first_id, attempt)
    async with run.session:
        # No variable holds the result: error reporters show the local variables of all frames.
        return parse_data(await read_result(run), options.output_type, run=run)


get_result = sync_version(aget_result)
