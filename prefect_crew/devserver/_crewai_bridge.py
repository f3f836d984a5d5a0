"""One CrewAI crew or flow on its thread: what it takes, what it reports to its run, and how it asks people.

This module imports CrewAI: import it only after `prepare_crewai`.
"""

# A provider of human input is given an executor whose public protocol consists of names like `_invoke_loop`.
# pyright: reportPrivateUsage=false
# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from functools import partial
from typing import Any

from crewai import Crew, Flow, Task
from crewai.agents.parser import AgentAction, AgentFinish
from crewai.core.providers.human_input import (
    AsyncExecutorContext,
    ExecutorContext,
    SyncHumanInputProvider,
    set_provider,
)
from crewai.crews.crew_output import CrewOutput
from crewai.events import (
    AgentLogsExecutionEvent,
    MethodExecutionFinishedEvent,
    MethodExecutionStartedEvent,
    TaskCompletedEvent,
    TaskStartedEvent,
    ToolUsageErrorEvent,
    ToolUsageFinishedEvent,
)
from crewai.events.stream_context import add_stream_sink
from crewai.events.utils.console_formatter import set_suppress_console_output
from crewai.flow import (
    ConsoleProvider,
    HumanFeedbackPending,
    HumanFeedbackResult,
    PendingFeedbackContext,
    flow_config,
)
from crewai.flow.flow_context import current_flow_method_name
from crewai.hooks import HookAborted, InterceptionPoint
from crewai.hooks.dispatch import scoped_hooks
from crewai.lite_agent_output import LiteAgentOutput
from crewai.tasks.task_output import TaskOutput
from crewai.types.usage_metrics import UsageMetrics
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.devserver._runs import Answer, Outcome, ProgramNotFoundError, Run

_PLACEHOLDER = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*")
"""What CrewAI fills in. `fetch_inputs` also reports other text in braces, such as JSON in a prompt."""


def name_of(made: Crew | Flow[Any]) -> str | None:
    """Return the name that a crew or flow was given; of a nameless flow, its class's; of a nameless crew, None."""
    if isinstance(made, Crew):
        return made.name if made.name != "crew" else None  # CrewAI's default
    return made.name or type(made).__name__


def inputs_of(made: Crew | Flow[Any]) -> list[CrewInput]:
    """Return the inputs of a crew or flow that has not run.

    A crew's are the placeholders of its tasks and agents, all required. A flow's are the fields of its state model that
    are required or have a description, or all of them where none has one; there are none where the state is a
    dictionary. CrewAI cannot make a state whose fields lack a default, so a field is required where it says so:
    `topic: str = Field(default="", json_schema_extra={"required": True})`.
    """
    if isinstance(made, Crew):
        return [CrewInput(name=name) for name in sorted(made.fetch_inputs()) if _PLACEHOLDER.fullmatch(name)]
    state: Any = made.state
    if not isinstance(state, BaseModel):
        return []
    inputs: list[CrewInput] = []
    fields = {name: info for name, info in type(state).model_fields.items() if name != "id"}  # which is the state's own
    described = any(info.description for info in fields.values())
    for name, info in fields.items():
        extra: Any = info.json_schema_extra
        required = info.is_required() or (isinstance(extra, dict) and extra.get("required") is True)  # pyright: ignore[reportUnknownMemberType]
        if described and not (required or info.description):  # a field that the flow keeps for itself
            continue
        kind = getattr(info.annotation, "__name__", None) or str(info.annotation)
        default = None if required else _jsonable(info.get_default(call_default_factory=True))
        inputs.append(CrewInput(name=name, type=kind, description=info.description, required=required, default=default))
    return inputs


def is_flow(made: Crew | Flow[Any]) -> bool:
    """Return whether it is a flow, and no crew."""
    return isinstance(made, Flow)


def task_label(task: Task) -> str:
    """Return what the server calls a task: its name, or the start of its description."""
    if task.name:
        return task.name
    description = " ".join(task.description.split())
    return description if len(description) <= 60 else f"{description[:59].rstrip()}…"


def task_result(task: Task, output: TaskOutput) -> TaskResult:
    """Return what an ended task gave."""
    text, data = result_of(output)
    return TaskResult(
        name=task_label(task),
        agent=output.agent,
        output=text,
        data=data,
        execution_time=task.execution_duration,
        description=output.description,
    )


def result_of(value: Any) -> tuple[str, Any]:
    """Return the text of a result, and its structured form as JSON values, or None where it is text alone."""
    if value is None:
        return "", None
    if isinstance(value, (CrewOutput, TaskOutput, LiteAgentOutput)):
        return value.raw, _jsonable(value.to_dict()) or None
    if isinstance(value, HumanFeedbackResult):
        return result_of(value.output)
    plain = _jsonable(value)
    if isinstance(plain, str):
        return plain, None
    return json.dumps(plain, ensure_ascii=False), None if isinstance(plain, (bool, int, float)) else plain


def token_usage(metrics: UsageMetrics) -> TokenUsage | None:
    """Return the usage, or None where the models have counted nothing."""
    if not (metrics.successful_requests or metrics.total_tokens):
        return None
    return TokenUsage(**metrics.model_dump(include=set(TokenUsage.model_fields)))


def _jsonable(value: Any) -> Any:
    return to_jsonable_python(value, fallback=str, inf_nan_mode="null")


_current: ContextVar[Bridge | None] = ContextVar("prefect_crew_bridge", default=None)
"""The run of a thread. CrewAI calls its one provider of feedback without it, and copies the context to its threads."""

NOT_APPROVED = "This is not approved. Improve it."
"""What an agent hears when a person rejects its work without a word."""


class Bridge:
    """A run that lives on the server's event loop, for use from CrewAI's threads."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        self.run = run
        self._loop = loop
        self._stopped = False
        self._asking: set[Future[Answer]] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End the run at the next model call, tool call or step, and every question to a person at once."""
        with self._lock:
            self._stopped = True
            asking = list(self._asking)
        for future in asking:
            future.cancel()

    def check(self, _: object = None) -> None:
        """Be the hook before model calls, tool calls and steps.

        Raises:
            HookAborted: The run was stopped.
        """
        if self._stopped or self.run.stop_requested:
            raise HookAborted("the run was stopped", source="prefect-crew")

    def report(self, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Have the loop call one of the run's methods, in order; not once the run was stopped."""
        if not (self._stopped or self.run.stop_requested):
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(partial(method, *args, **kwargs))

    def ask(self, *, task_id: str, output: str) -> Answer:
        """Wait for a person, on a thread of CrewAI's.

        Raises:
            HookAborted: The run was stopped instead.
        """
        with self._lock:
            self.check()
            future = asyncio.run_coroutine_threadsafe(self.run.ask(task_id=task_id, output=output), self._loop)
            self._asking.add(future)
        future.add_done_callback(self._asking.discard)
        try:
            return future.result()
        except CancelledError:
            raise HookAborted("the run was stopped", source="prefect-crew") from None


class HumanInput(SyncHumanInputProvider):
    """Tasks with `human_input=True`: what a person approves is taken as it is, what they reject is done again."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def handle_feedback(self, formatted_answer: AgentFinish, context: ExecutorContext) -> AgentFinish:
        result = formatted_answer
        while context.ask_for_human_input:
            answer = self._bridge.ask(task_id=_asked_of(context), output=self._get_output_string(result))
            if not _take(answer, context):
                result = context._invoke_loop()
        return result

    async def handle_feedback_async(self, formatted_answer: AgentFinish, context: AsyncExecutorContext) -> AgentFinish:
        result = formatted_answer
        while context.ask_for_human_input:
            output = self._get_output_string(result)
            answer = await asyncio.to_thread(self._bridge.ask, task_id=_asked_of(context), output=output)
            if not _take(answer, context):
                result = await context._ainvoke_loop()
        return result


def _asked_of(context: ExecutorContext) -> str:
    return task_label(context.task) if context.task is not None else str(context.agent.role)


def _take(answer: Answer, context: ExecutorContext) -> bool:
    """Tell the agent what a person answered, and return whether they approved."""
    if answer.approve:
        context.ask_for_human_input = False
    else:
        context.messages.append(context._format_feedback_message(answer.feedback.strip() or NOT_APPROVED))
    return answer.approve


class _FlowFeedback:
    """`@human_feedback` and `Flow.ask` of flows that the server runs; other flows of this process ask the console."""

    def request_feedback(self, context: PendingFeedbackContext, flow: Flow[Any]) -> str:
        bridge = _current.get()
        if bridge is None:
            return ConsoleProvider().request_feedback(context, flow)
        output, _ = result_of(context.method_output)
        return feedback_text(context, bridge.ask(task_id=context.method_name, output=output))

    def request_input(self, message: str, flow: Flow[Any], metadata: dict[str, Any] | None = None) -> str | None:
        bridge = _current.get()
        if bridge is None:
            return ConsoleProvider().request_input(message, flow, metadata)
        return bridge.ask(task_id=current_flow_method_name.get(), output=message).feedback


def register_feedback_provider() -> None:
    """Become CrewAI's provider of feedback and input, unless the user has set one."""
    provider = _FlowFeedback()
    flow_config.hitl_provider = flow_config.hitl_provider or provider
    flow_config.input_provider = flow_config.input_provider or provider


def feedback_text(context: PendingFeedbackContext, answer: Answer) -> str:
    """Return what a flow hears of an answer.

    Where the feedback decides among outcomes (`emit`), CrewAI has a model read it: it must say whether the person
    approved. A person who names an outcome is taken at their word. Elsewhere the flow gets the person's feedback as it
    is, and a rejection without feedback is not sent as an empty text, which to a flow means approval.
    """
    said = answer.feedback.strip()
    verdict = "Approved" if answer.approve else "Rejected"
    if not context.emit:
        return said if said or answer.approve else verdict
    if said.casefold() in (outcome.casefold() for outcome in context.emit):
        return said
    return f"{verdict}: {said}" if said else verdict


def build(factory: Callable[[], Any]) -> Any:
    """Return the Crew or Flow that a factory builds; of a `@CrewBase` class, its crew.

    Raises:
        ProgramNotFoundError: It is neither a Crew nor a Flow.
    """
    made: Any = factory()
    if inspect.iscoroutine(made):
        made.close()
        raise ProgramNotFoundError("The factory is async: build the Crew or Flow in a plain function.")
    if not _runs(made) and callable(crew := getattr(made, "crew", None)):
        made = crew()
    if not _runs(made):
        raise ProgramNotFoundError(
            f"The factory returned {type(made).__name__}: return a crewai Crew or Flow, or an instance of a "
            "@CrewBase class."
        )
    return made


def _runs(made: Any) -> bool:
    return isinstance(made, (Crew, Flow))


def run_once(factory: Callable[[], Any], bridge: Bridge) -> Outcome:
    """Build a crew and run it, on a thread and in a context of its own.

    Raises:
        HookAborted: The run was stopped.
        Exception: Whatever the crew or its factory raises.
    """
    _current.set(bridge)
    set_provider(HumanInput(bridge))
    stopping = (InterceptionPoint.PRE_MODEL_CALL, InterceptionPoint.PRE_TOOL_CALL, InterceptionPoint.PRE_STEP)
    with scoped_hooks({point: [bridge.check] for point in stopping}):
        made = build(factory)
        made.stream = False  # its chunks would have no reader here
        return _run_crew(made, bridge) if isinstance(made, Crew) else _run_flow(made, bridge)


def _run_crew(crew: Any, bridge: Bridge) -> Outcome:
    set_suppress_console_output(not (crew.verbose or any(agent.verbose for agent in crew.agents)))
    add_stream_sink(_CrewWatch(crew, bridge).see)
    result = crew.kickoff(inputs=dict(bridge.run.inputs))
    output, data = result_of(result)
    return Outcome(output=output, data=data, usage=token_usage(result.token_usage))


def _run_flow(flow: Any, bridge: Bridge) -> Outcome:
    set_suppress_console_output(True)
    watch = _FlowWatch(flow, bridge)
    add_stream_sink(watch.see)
    usage = UsageMetrics()
    restored = {} if bridge.run.restore_from is None else {"restore_from_state_id": bridge.run.restore_from}
    result = flow.kickoff(inputs=dict(bridge.run.inputs), **restored)
    usage.add_usage_metrics(flow.usage_metrics)
    while isinstance(result, HumanFeedbackPending):
        # A provider of the flow's own has let go of the thread; the person answers here all the same.
        context = result.context
        output, _ = result_of(context.method_output)
        answer = bridge.ask(task_id=context.method_name, output=output)
        watch.flow = flow = flow.from_pending(context.flow_id, flow.persistence)
        result = flow.resume(feedback_text(context, answer))
        usage.add_usage_metrics(flow.usage_metrics)
    output, data = result_of(result)
    return Outcome(output=output, data=data, usage=token_usage(usage))


class _Watch:
    """Turns CrewAI's events into calls of the run.

    A stream sink is called at once and in order on the thread that emits, unlike a handler of the event bus, which
    ten threads share; and only for events of its own context. It must not raise, or the crew would.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.run = bridge.run
        self.report = bridge.report

    def see_step(self, event: Any) -> None:
        if isinstance(event, AgentLogsExecutionEvent):
            kind, content = "final_answer", ""
            if isinstance(event.formatted_answer, AgentAction):
                kind, content = "thought", event.formatted_answer.thought.removeprefix("Thought:").strip()
            else:
                content, _ = result_of(getattr(event.formatted_answer, "output", event.formatted_answer))
            if content or kind == "final_answer":
                self.report(self.run.step, agent=event.agent_role, kind=kind, content=content)
        elif isinstance(event, (ToolUsageFinishedEvent, ToolUsageErrorEvent)):
            output = str(event.output if isinstance(event, ToolUsageFinishedEvent) else event.error)
            self.report(self.run.step, agent=event.agent_role, kind="tool", content=output, tool=event.tool_name)


class _CrewWatch(_Watch):
    """A crew's own tasks are the run's tasks; those of crews that its tools run are not."""

    def __init__(self, crew: Any, bridge: Bridge) -> None:
        super().__init__(bridge)
        self._crew = crew
        self._is_planned = False

    def see(self, source: Any, event: Any) -> None:
        if isinstance(event, (TaskStartedEvent, TaskCompletedEvent)):
            if not self._is_planned:  # not earlier: only now are the inputs in descriptions that stand for a name
                self._is_planned = True
                self.report(self.run.plan, [task_label(task) for task in self._crew.tasks])
            if not any(source is task for task in self._crew.tasks):
                return
            if isinstance(event, TaskCompletedEvent):
                self.report(self.run.task_ended, task_result(source, event.output))
            else:
                agent = source.agent.role if source.agent else None
                self.report(self.run.task_started, task_label(source), agent=agent, description=source.description)
        else:
            self.see_step(event)


class _FlowWatch(_Watch):
    """A flow's methods are the run's tasks."""

    def __init__(self, flow: Any, bridge: Bridge) -> None:
        super().__init__(bridge)
        self.flow = flow
        self._began: dict[str, float] = {}
        methods = flow.flow_definition().methods
        if not any(method.router or method.human_feedback for method in methods.values()):
            self.report(self.run.plan, list(methods))  # nothing chooses among them, so all will run

    def see(self, source: Any, event: Any) -> None:
        if source is not self.flow:
            self.see_step(event)
        elif isinstance(event, MethodExecutionStartedEvent):
            self._began[event.method_name] = time.monotonic()
            self.report(self.run.task_started, event.method_name)
        elif isinstance(event, MethodExecutionFinishedEvent):
            self.report(self.run.task_ended, self._result(event))

    def _result(self, event: MethodExecutionFinishedEvent) -> TaskResult:
        name = event.method_name
        # Of a method whose feedback chose among outcomes, the event has the outcome; its output was what a person saw.
        reviewed = next((one for one in reversed(self.flow.human_feedback_history) if one.method_name == name), None)
        output, data = result_of(reviewed if reviewed and reviewed.outcome else event.result)
        now = time.monotonic()
        seconds = round(now - self._began.get(name, now), 3)
        return TaskResult(name=name, output=output, data=data, execution_time=seconds)
