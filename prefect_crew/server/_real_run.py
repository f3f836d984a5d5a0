"""Running one Crew or Flow on the thread it was given, and telling the server what CrewAI's events say.

This module imports CrewAI: import it only after `prepare_crewai`. Crews and flows are Any here: CrewAI's own types for
what they give are unions with streams that never occur here, and two classes called Flow.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from crewai import Crew, Flow
from crewai.agents.parser import AgentAction
from crewai.core.providers.human_input import set_provider
from crewai.events import (
    AgentLogsExecutionEvent,
    MethodExecutionFailedEvent,
    MethodExecutionFinishedEvent,
    MethodExecutionStartedEvent,
    TaskCompletedEvent,
    TaskStartedEvent,
    ToolUsageErrorEvent,
    ToolUsageFinishedEvent,
)
from crewai.events.stream_context import add_stream_sink
from crewai.events.utils.console_formatter import set_suppress_console_output
from crewai.flow import HumanFeedbackPending
from crewai.hooks import InterceptionPoint
from crewai.hooks.dispatch import scoped_hooks
from crewai.types.usage_metrics import UsageMetrics

from prefect_crew.api.models import TaskResult
from prefect_crew.server._real_bridge import Bridge, HumanInput, feedback_text
from prefect_crew.server._real_results import result_of, task_label, task_result, token_usage
from prefect_crew.server.program import Outcome, ProgramNotFoundError

__all__ = ["build", "run_once"]


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
    bridge.enter()
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
        self.bridge = bridge

    def see_step(self, event: Any) -> None:
        run, tell = self.bridge.run, self.bridge.tell
        if isinstance(event, AgentLogsExecutionEvent):
            said = event.formatted_answer
            if isinstance(said, AgentAction):
                if thought := said.thought.removeprefix("Thought:").strip():
                    tell(run.step, agent=event.agent_role, kind="thought", content=thought)
            else:
                content, _ = result_of(getattr(said, "output", said))
                tell(run.step, agent=event.agent_role, kind="final_answer", content=content)
        elif isinstance(event, (ToolUsageFinishedEvent, ToolUsageErrorEvent)):
            found = event.output if isinstance(event, ToolUsageFinishedEvent) else event.error
            tell(run.step, agent=event.agent_role, kind="tool", content=str(found), tool=event.tool_name)


class _CrewWatch(_Watch):
    """A crew's own tasks are the run's tasks; those of crews that its tools run are not."""

    def __init__(self, crew: Any, bridge: Bridge) -> None:
        super().__init__(bridge)
        self._crew = crew
        self._planned = False

    def see(self, source: Any, event: Any) -> None:
        run, tell = self.bridge.run, self.bridge.tell
        if isinstance(event, TaskStartedEvent):
            if not self._planned:  # not earlier: descriptions that stand for a name have their inputs only now
                self._planned = True
                tell(run.plan, [task_label(task) for task in self._crew.tasks])
            if self._owns(source):
                agent = source.agent.role if source.agent else None
                tell(run.task_started, task_label(source), agent=agent, description=source.description)
        elif isinstance(event, TaskCompletedEvent):
            if self._owns(source):
                tell(run.task_ended, task_result(source, event.output))
        else:
            self.see_step(event)

    def _owns(self, task: Any) -> bool:
        return any(task is own for own in self._crew.tasks)


@dataclass
class _Method:
    name: str
    began: float = field(default_factory=time.monotonic)
    agents: list[str] = field(default_factory=list[str])


_method: ContextVar[_Method | None] = ContextVar("prefect_crew_flow_method", default=None)


class _FlowWatch(_Watch):
    """A flow's methods are the run's tasks, and the agents that work in one are its agents.

    CrewAI runs a method in the context in which its start was told, or in a copy of it: that is how its agents are
    told from those of methods that run at the same time.
    """

    def __init__(self, flow: Any, bridge: Bridge) -> None:
        super().__init__(bridge)
        self.flow = flow
        methods = flow.flow_definition().methods
        if not any(method.router or method.human_feedback for method in methods.values()):
            bridge.tell(bridge.run.plan, list(methods))  # nothing chooses among them, so all will run

    def see(self, source: Any, event: Any) -> None:
        run, tell = self.bridge.run, self.bridge.tell
        if isinstance(event, MethodExecutionStartedEvent) and source is self.flow:
            _method.set(_Method(event.method_name))
            tell(run.task_started, event.method_name)
        elif isinstance(event, (MethodExecutionFinishedEvent, MethodExecutionFailedEvent)) and source is self.flow:
            if isinstance(event, MethodExecutionFinishedEvent):
                tell(run.task_ended, self._result(event))
            _method.set(None)
        else:
            if isinstance(event, AgentLogsExecutionEvent) and (method := _method.get()):
                method.agents += [event.agent_role] if event.agent_role not in method.agents else []
            self.see_step(event)

    def _result(self, event: MethodExecutionFinishedEvent) -> TaskResult:
        name = event.method_name
        # Of a method whose feedback chose among outcomes, the event has the outcome; its output was what a person saw.
        reviewed = next((one for one in reversed(self.flow.human_feedback_history) if one.method_name == name), None)
        output, data = result_of(reviewed if reviewed and reviewed.outcome else event.result)
        method = _method.get() or _Method(name)
        return TaskResult(
            name=name,
            agent=", ".join(method.agents) or None,
            output=output,
            data=data,
            execution_time=round(time.monotonic() - method.began, 3),
        )
