"""CrewAI code as a program of the dev server. Each run has a thread of its own, and reports to the server's run.

This module imports CrewAI, which takes seconds: import it only where such code is served.

Raises:
    ProgramNotFoundError: CrewAI is not installed.
"""

# Its environment is set before CrewAI is imported. And a provider of human input is given an executor whose public
# protocol consists of names like `_invoke_loop`.
# pyright: reportPrivateUsage=false
# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextvars import ContextVar
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from pydantic_core import to_jsonable_python

from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.devserver._runs import Answer, Outcome, ProgramError, ProgramNotFoundError, Run

if importlib.util.find_spec("crewai") is None:
    raise ProgramNotFoundError(
        "Serving CrewAI code needs CrewAI: pip install 'prefect-crew[crewai]', with Python below 3.14. "
        f"This is Python {sys.version_info.major}.{sys.version_info.minor}."
    )
os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")  # it waits 10 s at exit where there is no network
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")
os.environ.setdefault("CREWAI_DISABLE_VERSION_CHECK", "true")
if not os.environ.get("CREWAI_STORAGE_DIR"):
    # The files of crews (task outputs, memory, paused flows) are removed with this process.
    os.environ["CREWAI_STORAGE_DIR"] = tempfile.mkdtemp(prefix="prefect-crew-")
    atexit.register(shutil.rmtree, os.environ["CREWAI_STORAGE_DIR"], ignore_errors=True)

from crewai import Crew, Flow, Task, events
from crewai.agents.parser import AgentAction, AgentFinish
from crewai.core.providers.human_input import (
    AsyncExecutorContext,
    ExecutorContext,
    SyncHumanInputProvider,
    set_provider,
)
from crewai.crews.crew_output import CrewOutput
from crewai.events.stream_context import add_stream_sink
from crewai.events.utils.console_formatter import set_suppress_console_output
from crewai.flow import HumanFeedbackPending, HumanFeedbackResult, PendingFeedbackContext, flow_config
from crewai.flow.flow_context import current_flow_method_name
from crewai.hooks import HookAborted, InterceptionPoint
from crewai.hooks.dispatch import scoped_hooks
from crewai.lite_agent_output import LiteAgentOutput
from crewai.tasks.task_output import TaskOutput

STOP_SECONDS = 2.0
"""Seconds of the wait for a stopped run's thread. For its clients the run has ended before."""

MAX_RUNS = 100
"""Runs at once, of which each needs a thread."""

_PLACEHOLDER = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*")
"""Inputs that CrewAI fills in. `fetch_inputs` also reports other text in braces, such as JSON in a prompt."""


def load_crewai(spec: str) -> CrewAIProgram:
    """Return the program of a `module:factory`. This builds the crew once, to read its inputs.

    Args:
        spec: The name of an importable module (also of the current directory) or the path of a Python file, a colon,
            and the name of a function without arguments that returns a new Crew or Flow at each call.

    Raises:
        ProgramNotFoundError: The function does not exist, or does not build a fresh Crew or Flow.
    """
    path, _, name = spec.rpartition(":")
    folder, module = (Path(path).resolve().parent, Path(path).stem) if path.endswith(".py") else (Path.cwd(), path)
    for place in (Path.cwd() / "src", Path.cwd(), folder):  # `src` is where `crewai create crew` puts it
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    try:
        factory: Callable[[], Any] = attrgetter(name)(importlib.import_module(module))  # a name may have dots
        return CrewAIProgram(factory, module.rpartition(".")[2])
    except (Exception, SystemExit) as error:
        raise ProgramNotFoundError(
            f"{spec} cannot be loaded: {type(error).__name__}: {error}. Name a function without arguments that returns "
            "a new Crew or Flow at each call, since each serves one run at a time."
        ) from error


class CrewAIProgram:
    """The crew or flow that a function builds for each run. Without a name of its own it has the name of the `module`.

    Raises:
        Exception: The factory raised it. TypeError: The factory builds another thing, or the same object again.
    """

    def __init__(self, factory: Callable[[], Any], module: str) -> None:
        crew = _build(factory)
        if crew is _build(factory):
            raise TypeError("it returned the same object twice")
        self.flow = isinstance(crew, Flow)
        name = crew.name if crew.name != "crew" else None  # CrewAI's default
        self.name: str = name or (type(crew).__name__ if self.flow else module)
        self._factory = factory
        self._inputs = _flow_inputs(crew) if self.flow else _crew_inputs(crew)
        self._slots = asyncio.Semaphore(MAX_RUNS)
        tasks = [] if self.flow else [(task.description, task.expected_output) for task in crew.tasks]
        self._definition = {"name": self.name, "inputs": [item.name for item in self._inputs], "tasks": tasks}

    def inputs(self) -> list[CrewInput]:
        return self._inputs

    def definition(self) -> dict[str, Any]:
        return self._definition

    async def execute(self, run: Run) -> Outcome:
        """Run the crew once, on a thread of its own.

        After a cancellation, the thread ends at the crew's next model call, tool call or step. A call under way cannot
        be taken back, and the wait for it ends after STOP_SECONDS.
        """
        loop = asyncio.get_running_loop()
        bridge = _Bridge(run, loop)
        ended: asyncio.Future[Outcome | BaseException] = loop.create_future()

        def work() -> None:
            result: Outcome | BaseException
            try:
                result = _run(self._factory, bridge)
            except BaseException as error:  # noqa: BLE001 - whatever ends the thread ends this run, not the server
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(ended.set_result, result)

        async with self._slots:
            # A daemon, so that no thread of ours delays the end of the process.
            threading.Thread(target=work, name=f"crew run {run.id}", daemon=True).start()
            try:
                await asyncio.wait([ended])
            except asyncio.CancelledError:
                bridge.stop()
                # CrewAI logs tracebacks when the interpreter ends under a crew; nearly all are quicker than this.
                await asyncio.wait([ended], timeout=STOP_SECONDS)
                raise
        result = ended.result()
        if isinstance(result, BaseException):
            raise ProgramError(str(result) or type(result).__name__) from result
        return result


def _build(factory: Callable[[], Any]) -> Any:
    """Return the Crew or Flow of a factory. The crew of a `@CrewBase` class is its method `crew`."""
    product = factory()
    kinds: Any = (Crew, Flow)
    crew = None if isinstance(product, kinds) else getattr(product, "crew", None)
    product = crew() if callable(crew) else product
    if not isinstance(product, kinds):
        raise TypeError(f"it returned {type(product).__name__}")
    return product


def _crew_inputs(crew: Crew) -> list[CrewInput]:
    return [CrewInput(name=name) for name in sorted(crew.fetch_inputs()) if _PLACEHOLDER.fullmatch(name)]


def _flow_inputs(flow: Flow[Any]) -> list[CrewInput]:
    """Return the fields of a flow's state, as AMP does: with `id` only if the author's own model has it.

    CrewAI cannot make a state whose fields lack a default, so a field is required if it declares that:
    `topic: str = Field(default="", json_schema_extra={"required": True})`. A state that is a dictionary
    has no fields.
    """
    model = cast("Any", type(flow.state))
    model = model.__bases__[1] if model.__name__ == "StateWithId" else model  # CrewAI's, around the author's
    inputs: list[CrewInput] = []
    for name, info in getattr(model, "model_fields", {}).items():
        kind = getattr(info.annotation, "__name__", None) or str(info.annotation)
        extra: Any = info.json_schema_extra
        required = isinstance(extra, dict) and extra.get("required") is True  # pyright: ignore[reportUnknownMemberType]
        default = None if required or name == "id" else _jsonable(info.get_default(call_default_factory=True))
        inputs.append(CrewInput(name=name, type=kind, description=info.description, required=required, default=default))
    return inputs


# The reports of CrewAI


class _Bridge:
    """A run that lives on the server's event loop, for use from CrewAI's threads."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        self.run = run
        self._loop = loop
        self._stopped = False

    def stop(self) -> None:
        """End the run at the next model call, tool call or step, and every question to a person at once."""
        self._stopped = True
        for question in self.run.questions.values():
            question.answer.cancel()

    def check(self, _: object = None) -> None:
        """Check for a stop. CrewAI calls this hook before model calls, tool calls and steps.

        Raises:
            HookAborted: The run was stopped.
        """
        if self._stopped:
            raise HookAborted("the run was stopped", source="prefect-crew")

    def report(self, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call one of the run's methods on the loop, in order. After a stop, do nothing."""
        if not self._stopped:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(partial(method, *args, **kwargs))

    def ask(self, task_id: str, output: Any) -> Answer:
        """Wait for a person, on a thread of CrewAI's.

        Raises:
            HookAborted: The run was stopped instead.
        """

        async def asked() -> Answer:
            self.check()  # on the loop, as stop(), so that no question comes after that
            return await self.run.ask(task_id=task_id, output=_result_of(output)[0])

        try:
            return asyncio.run_coroutine_threadsafe(asked(), self._loop).result()
        except CancelledError:
            raise HookAborted("the run was stopped", source="prefect-crew") from None


class _Watch:
    """Turns CrewAI's events into calls of the run. A flow's methods are its tasks.

    `see` is a stream sink: called at once and in order on the thread that emits, unlike a handler of the event bus,
    which ten threads share; and only for events of its own context. It must not raise, or the crew would.
    """

    def __init__(self, made: Any, bridge: _Bridge) -> None:
        self._made = made
        self._run = bridge.run
        self._report = bridge.report
        self._began: dict[str, float] = {}
        if isinstance(made, Flow):
            methods = made.flow_definition().methods
            if not any(method.router or method.human_feedback for method in methods.values()):
                self._report(self._run.plan, list(methods))  # nothing chooses among them, so all will run

    def see(self, source: Any, event: Any) -> None:
        # The tasks of crews that a tool or a flow runs are not the run's.
        own = source is self._made or any(source is task for task in getattr(self._made, "tasks", ()))
        match event:
            case events.TaskStartedEvent() if own:
                if not self._run.planned:  # not earlier: only now are the inputs in descriptions that stand for a name
                    self._report(self._run.plan, [_label(task) for task in self._made.tasks])
                agent = source.agent.role if source.agent else None
                self._report(self._run.task_started, _label(source), agent=agent)
            case events.TaskCompletedEvent() if own:
                self._report(self._run.task_ended, _task_result(source, event.output))
            case events.MethodExecutionStartedEvent() if own:
                self._began[event.method_name] = time.monotonic()
                self._report(self._run.task_started, event.method_name)
            case events.MethodExecutionFinishedEvent() if own:
                self._report(self._run.task_ended, self._method_result(event))
            case events.AgentLogsExecutionEvent(formatted_answer=AgentAction() as action):
                if thought := action.thought.removeprefix("Thought:").strip():
                    self._step(event, "thought", thought)
            case events.AgentLogsExecutionEvent(formatted_answer=answer):
                self._step(event, "final_answer", _result_of(getattr(answer, "output", answer))[0])
            case events.ToolUsageFinishedEvent(output=text) | events.ToolUsageErrorEvent(error=text):
                self._step(event, "tool", str(text), tool=event.tool_name)
            case _:
                pass

    def _step(self, event: Any, kind: str, content: str, *, tool: str | None = None) -> None:
        self._report(self._run.step, agent=event.agent_role, kind=kind, content=content, tool=tool)

    def _method_result(self, event: events.MethodExecutionFinishedEvent) -> TaskResult:
        name = event.method_name
        # Of a method whose feedback chose among outcomes, the event has the outcome; its output was what a person saw.
        history = [
            review for review in self._made.human_feedback_history if review.method_name == name and review.outcome
        ]
        output, data = _result_of(history[-1] if history else event.result)
        seconds = time.monotonic() - self._began.get(name, time.monotonic())
        return TaskResult(name=name, output=output, data=data, execution_time=round(seconds, 3))


def _label(task: Task) -> str:
    """Return the label of a task: its name, or the start of its description."""
    description = " ".join(task.description.split())
    return task.name or (description if len(description) <= 60 else f"{description[:59].rstrip()}…")


def _task_result(task: Task, output: TaskOutput) -> TaskResult:
    text, data = _result_of(output)
    return TaskResult(
        name=_label(task),
        agent=output.agent,
        output=text,
        data=data,
        execution_time=task.execution_duration,
        description=output.description,
    )


def _result_of(value: Any) -> tuple[str, Any]:
    """Return the text of a result, and its structured form as JSON values, or None if it has only text."""
    if isinstance(value, (CrewOutput, TaskOutput, LiteAgentOutput)):
        return value.raw, _jsonable(value.to_dict()) or None
    if isinstance(value, HumanFeedbackResult):
        return _result_of(value.output)
    plain = _jsonable(value)
    if plain is None or isinstance(plain, str):
        return plain or "", None
    return json.dumps(plain, ensure_ascii=False), plain


def _jsonable(value: Any) -> Any:
    return to_jsonable_python(value, fallback=str, inf_nan_mode="null")


# How it asks

_current: ContextVar[_Bridge] = ContextVar("prefect_crew_bridge")
"""The run of a thread. CrewAI calls its providers of feedback without it, and copies the context to its threads."""

NOT_APPROVED = "This is not approved. Improve it."
"""The feedback to an agent when a person rejects its work without a word."""


class _HumanInput(SyncHumanInputProvider):
    """Tasks with `human_input=True`. An approved output stays; a rejected task is done again."""

    def handle_feedback(self, formatted_answer: AgentFinish, context: ExecutorContext) -> AgentFinish:
        task = _label(context.task) if context.task is not None else str(context.agent.role)
        result = formatted_answer
        while context.ask_for_human_input:
            answer = _current.get().ask(task, self._get_output_string(result))
            if answer.approve:
                context.ask_for_human_input = False
            else:
                context.messages.append(context._format_feedback_message(answer.feedback.strip() or NOT_APPROVED))
                result = context._invoke_loop()
        return result

    async def handle_feedback_async(self, formatted_answer: AgentFinish, context: AsyncExecutorContext) -> AgentFinish:
        return await asyncio.to_thread(self.handle_feedback, formatted_answer, context)


class _FlowFeedback:
    """`@human_feedback` and `Flow.ask`."""

    def request_feedback(self, context: PendingFeedbackContext, flow: Flow[Any]) -> str:
        answer = _current.get().ask(context.method_name, context.method_output)
        feedback = answer.feedback.strip()
        verdict = "Approved" if answer.approve else "Rejected"
        if not context.emit:  # an empty text means approval to a flow
            return feedback if feedback or answer.approve else verdict
        # A model reads it to choose among the outcomes. A person who names one is taken at their word.
        if feedback.casefold() in (outcome.casefold() for outcome in context.emit):
            return feedback
        return f"{verdict}: {feedback}" if feedback else verdict

    def request_input(self, message: str, flow: Flow[Any], metadata: dict[str, Any] | None = None) -> str | None:
        return _current.get().ask(current_flow_method_name.get(), message).feedback


flow_config.hitl_provider = flow_config.hitl_provider or _FlowFeedback()
flow_config.input_provider = flow_config.input_provider or _FlowFeedback()


def _run(factory: Callable[[], Any], bridge: _Bridge) -> Outcome:
    """Build a crew or flow and run it, on a thread and in a context of its own."""
    _current.set(bridge)
    set_provider(_HumanInput())
    run = bridge.run
    stopping = (InterceptionPoint.PRE_MODEL_CALL, InterceptionPoint.PRE_TOOL_CALL, InterceptionPoint.PRE_STEP)
    with scoped_hooks({point: [bridge.check] for point in stopping}):
        crew = _build(factory)
        crew.stream = False  # its chunks would have no reader here
        verbose = not isinstance(crew, Flow) and (crew.verbose or any(agent.verbose for agent in crew.agents))
        set_suppress_console_output(not verbose)
        add_stream_sink(_Watch(crew, bridge).see)
        if isinstance(crew, Flow):  # as on AMP, the id of its state is the kickoff id
            inputs = {"id": run.id, **run.inputs}
            result = crew.kickoff(inputs=inputs, restore_from_state_id=run.restore_from)
        else:
            result = crew.kickoff(inputs=dict(run.inputs))
    if isinstance(result, HumanFeedbackPending):
        raise ProgramError(
            "The flow asks people by its own provider, whose answers do not reach this server. Leave the provider out "
            "of the flow."
        )
    output, data = _result_of(result)
    counted = crew.usage_metrics if isinstance(crew, Flow) else result.token_usage
    usage = TokenUsage(**counted.model_dump(include=set(TokenUsage.model_fields)))
    return Outcome(output, data, usage if usage.successful_requests or usage.total_tokens else None)
