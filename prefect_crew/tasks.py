"""The Prefect tasks, for any flow. In a sync flow a call returns the result; in an async flow the call is awaited.

No task is cached, and Prefect retries only safe steps: a kickoff only after an error that surely started no run. A
retried flow reattaches to its runs by their attempts, not by stored results.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack, cast
from uuid import UUID

from prefect import Task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.tasks import TaskOptions

from prefect_crew._internal.asyncio_tasks import in_async_context, run_sync
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew.blocks import DeployedCrew, load_crew
from prefect_crew.budgets import Budget
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.inputs import Inputs, Unshown
from prefect_crew.client.models import CrewInput, CrewResult, Data, ResumeAnswer, StopAnswer
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import Crew, CrewSession, WaitPolicy
from prefect_crew.exceptions import ConfigurationError, CrewError, PrefectAwayError
from prefect_crew.runs.keys import calling_task, digest, identify
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.start import kick_off, open_run
from prefect_crew.runs.stop import stop_run
from prefect_crew.runs.wait import wait_for_run

_naming_prefect_away = naming_prefect_away("Call the task again, which reattaches to a run that was started.")


def _hidden(value: Any) -> Any:
    """Replace the mappings in arguments by dicts whose repr hides the values, since a task's inputs may be secret.

    Only the crew's block, which is not loaded yet, has the names of the secret inputs. The frames of Prefect's engine
    contain all arguments, and error reporters show frames.
    """
    if isinstance(value, unmapped):
        return unmapped(_hidden(cast("Any", value).unwrap()))
    if isinstance(value, Mapping):
        return Unshown(cast("Mapping[Any, Any]", value))
    if type(value) in (list, tuple):
        return type(value)(_hidden(item) for item in value)
    return value


class CrewTask(Task[..., Any]):
    """A Prefect task over an async function. Sync code can call it as well, and gets the result.

    Type checkers see `Any`: what a call returns depends on the code around it, which no type can say.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task. Return the result in sync code, an awaitable of the result in async code."""
        args, kwargs = _hidden(args), {name: _hidden(value) for name, value in kwargs.items()}
        coroutine = self.acall(*args, **kwargs)
        return coroutine if in_async_context() else run_sync(coroutine)

    @_naming_prefect_away  # also of Prefect's engine, before the task runs
    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task from a coroutine, whatever kind of flow is around it."""
        with calling_task():
            return await cast("Any", super()).__call__(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """Submit the task to the flow's task runner, like Prefect's own method."""
        args, kwargs = _hidden(args), {name: _hidden(value) for name, value in kwargs.items()}
        with calling_task():
            return cast("Any", super()).submit(*args, **kwargs)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """Map the task over iterables on the flow's task runner, like Prefect's own method."""
        args, kwargs = _hidden(args), {name: _hidden(value) for name, value in kwargs.items()}
        with calling_task():
            return cast("Any", super()).map(*args, **kwargs)

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to defer the task to a task worker, since Prefect would store the parameters, with the crew's token.

        Raises:
            ConfigurationError: Always. Nothing was stored.
        """
        del args, kwargs  # error reporters show the variables of frames
        raise ConfigurationError(
            f"The task {self.name} cannot be deferred to a task worker, because Prefect would store the crew's token "
            "with its parameters. Nothing was stored. Call the task in a flow instead."
        )

    delay = apply_async

    def with_options(self, **options: Unpack[TaskOptions]) -> CrewTask:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a copy with other options, like Prefect's own method."""
        copy = super().with_options(**cast("Any", options))
        # Prefect's method always makes a plain Task; our subclass differs from it only in its methods.
        copy.__class__ = CrewTask
        return cast("CrewTask", copy)


def _inside_own_task() -> bool:
    """Return whether this call runs in the task run of one of these tasks. With `kickoff_crew.fn` it does not."""
    context = TaskRunContext.get()
    return context is not None and isinstance(context.task, CrewTask)


async def _surely_not_done(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry a kickoff, or an answer for a person, only if the crew's server surely did not accept it."""
    del task, task_run
    error = await state.aresult(raise_on_failure=False)
    # The Prefect API did not answer. If a POST was sent before, a second try finds it on record and sends none.
    if isinstance(error, PrefectAwayError):
        return True
    return isinstance(error, CrewError) and kickoff_fate(error) is KickoffFate.RETRY


def _task(verb: str, **options: Any) -> Callable[[Callable[..., Coroutine[Any, Any, Any]]], CrewTask]:
    """Make a task of an async function. `verb` begins the names of its task runs."""

    def task_run_name(parameters: dict[str, Any]) -> str:
        crew, title, origin = parameters.get("crew"), parameters.get("name"), ""
        kickoff_id = "" if title or isinstance(crew, LiveRun) else str(parameters.get("kickoff_id") or "")
        if isinstance(crew, LiveRun):
            if crew.attempt is not None and not crew.owned:
                origin = " (reattached)" if crew.attempt.ended_at is None else " (from record)"
            if "inputs" in parameters:
                crew.take(parameters["inputs"])
            title = title or crew.title
        elif title is None and isinstance(crew, Crew):
            with suppress(ConfigurationError):  # the body of the task raises it
                options = RunOptions(idempotency_key=parameters.get("idempotency_key"))
                title = LiveRun(crew, request=RunRequest.of(crew, Inputs.of(parameters.get("inputs")), options)).title
        title = title or getattr(crew, "label", crew)
        return f"{verb} {title} {kickoff_id[:8]}".strip()[: 200 - len(origin)] + origin

    # No tags, also not for what a wait has found: for each tag of a task run Prefect asks its server for a concurrency
    # slot, and the task run fails if the server cannot be reached.
    options |= {"cache_policy": NO_CACHE, "task_run_name": task_run_name}
    return lambda function: CrewTask(_naming_prefect_away(function), **options)


@_task("inputs", retries=2, retry_delay_seconds=2)
async def discover_inputs(crew: DeployedCrew | str) -> list[CrewInput]:
    """Return the inputs that a crew names; an empty list if it names none. `crew` may be the name of a stored block.

    Raises:
        CrewError: `GET /inputs` failed. A crew without `/inputs` raises CrewAPIError with status 404.
    """
    async with CrewSession(await load_crew(crew)) as session:
        return await session.client.inputs()


def under_budgets(crew: Crew, budgets: Sequence[Budget]) -> Crew:
    """Return a crew with further budgets. A budget without a name gets the name of the flow around this call, else the
    crew's name."""
    context = FlowRunContext.get()
    return crew.under(budgets, name=crew.label if context is None or context.flow is None else context.flow.name)


@_task("kickoff", retries=3, retry_delay_seconds=[2, 10, 30], retry_condition_fn=_surely_not_done)
async def kickoff_crew(
    crew: DeployedCrew | str,
    inputs: Mapping[str, Any] | Inputs | None = None,
    *,
    idempotency_key: str | None = None,
    name: str | None = None,
    force_new: bool = False,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    restore_from: str | UUID | None = None,
    session: str | None = None,
    budgets: Sequence[Budget] = (),
) -> str:
    """Kick a crew off, or find the run that its key already has, and return the kickoff id.

    `run_crew` explains the arguments. The task first checks the inputs against `GET /inputs`.

    Raises:
        InvalidInputsError: Inputs are missing or unknown; nothing was started.
        IdempotencyConflictError: The key belongs to another run; nothing was started.
        BudgetExceededError: A budget has no room for another run; nothing was started.
        SessionBlockedError: An earlier turn of the session is uncertain or lost; nothing was started.
        KickoffUncertainError: Nobody knows whether a run was started; the kickoff is not sent again.
        CrewConnectionError, CrewAPIError: The run surely did not start; Prefect retries this.
        PrefectAwayError: The Prefect API did not answer, so nothing was started; Prefect retries this.
    """
    inputs = Inputs.of(inputs)
    run = cast("object", crew)
    if isinstance(run, LiveRun):  # from `run_crew`
        if run.request is not None:
            run.take(inputs)
            await kick_off(run, run.request, inside_own_task=_inside_own_task())
        return run.kickoff_id
    options = RunOptions.of(
        idempotency_key=idempotency_key,
        name=name,
        force_new=force_new,
        meta=meta,
        webhooks=webhooks,
        restore_from=restore_from,
        session=session,
        budgets=budgets,
    )
    own = await load_crew(crew)
    request = RunRequest.of(under_budgets(own, options.budgets) if options.budgets else own, inputs, options)
    return (await open_run(request, inside_own_task=_inside_own_task())).kickoff_id


@_task("wait")
async def wait_for_crew(
    crew: DeployedCrew | str,
    kickoff_id: str,
    *,
    idempotency_key: str | None = None,
    name: str | None = None,
    wait: WaitPolicy | None = None,
    output_type: type[Data] | None = None,
    review: ReviewChoice | None = None,
) -> CrewResult[Data]:
    """Wait until a run has ended and return its result. You can call it for the same run any number of times.

    `name` and `idempotency_key` go into the task run's name. `run_crew` explains the other arguments.

    Raises:
        CrewFailedError, CrewStoppedError, CrewLostError: The run failed, was stopped, or its server has forgotten it.
        CrewTimeoutError: A time limit is over; the run may go on.
        OutputTypeError: The result does not fit `output_type`.
        CrewError: The status call gave no answer for too long.
    """
    del name, idempotency_key
    run = cast("object", crew)
    if isinstance(run, LiveRun):  # from `run_crew`
        return await wait_for_run(run, None if run.request is None else run.request.options)
    options = RunOptions.of(wait=wait, output_type=output_type, review=review)
    return await wait_for_run(LiveRun.of(await load_crew(crew), kickoff_id), options)


_REFUSED = (
    "cache_policy", "cache_key_fn", "cache_expiration", "refresh_cache", "persist_result", "result_storage",
    "result_serializer", "result_storage_key", "cache_result_in_memory", "retry_condition_fn",
)  # fmt: skip


def tasks_of(options: RunOptions) -> tuple[CrewTask, CrewTask]:
    """Return the kickoff task and the wait task of `run_crew`, each with its options of Prefect.

    Raises:
        ConfigurationError: Prefect's tasks refuse an option, or the kickoff task must not have it. Nothing was started.
    """
    if name := next((name for name in options.kickoff_options or {} if name in _REFUSED), None):
        raise ConfigurationError(
            f"kickoff_options cannot have {name!r}: only the crew database decides whether a run is started. Nothing "
            "was started. Leave it out."
        )
    both = ((kickoff_crew, options.kickoff_options), (wait_for_crew, options.wait_options))
    try:
        kickoff, wait = (task.with_options(**cast("Any", chosen)) if chosen else task for task, chosen in both)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"An option of a task cannot be used: {error}. Nothing was started.") from None
    return kickoff, wait


@_task("resume", retry_condition_fn=_surely_not_done)
async def resume_crew(
    crew: DeployedCrew | str,
    kickoff_id: str,
    *,
    feedback: str = "",
    approve: bool,
    task_id: str | None = None,
    webhooks: Webhooks | None = None,
) -> ResumeAnswer:
    """Answer in place of the person for whom a run waits. `task_id` defaults to the task in the status.

    If the flow run is retried after this call has answered, the call sends no other answer.

    Raises:
        CrewError: The run does not wait, its task is not known, or its question has an answer on record.
        AnswerUncertainError: The answer was sent, and nobody knows whether it arrived.
        CrewAPIError, CrewConnectionError: The server refused the answer, or the answer surely did not arrive.
    """
    # The identity has only the run and not the answer: a retry may answer in other words.
    identity = await identify("answer", kickoff_id, idempotency_key=None, name=None, inside_own_task=_inside_own_task())
    return await resume_run(
        LiveRun.of(await load_crew(crew), kickoff_id),
        feedback=feedback,
        approve=approve,
        task_id=task_id,
        webhooks=webhooks,
        call=digest(identity.idempotency_key),
    )


@_task("stop")
async def stop_crew(crew: DeployedCrew | str, kickoff_id: str) -> StopAnswer:
    """Ask the crew's server to stop a run. An ended run and a missing `/stop` are answers, not errors.

    Raises:
        CrewError: The request failed.
    """
    return await stop_run(LiveRun(await load_crew(crew), kickoff_id))
