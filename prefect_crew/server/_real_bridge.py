"""One run of real CrewAI code, between the threads that CrewAI works on and the server's event loop.

This module imports CrewAI: import it only after `prepare_crewai`.
"""

# A provider of human input is given an executor whose public protocol consists of names like `_invoke_loop`.
# pyright: reportPrivateUsage=false
# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from functools import partial
from typing import Any

from crewai.agents.parser import AgentFinish
from crewai.core.providers.human_input import AsyncExecutorContext, ExecutorContext, SyncHumanInputProvider
from crewai.flow import ConsoleProvider, Flow, PendingFeedbackContext, flow_config
from crewai.flow.flow_context import current_flow_method_name
from crewai.hooks import HookAborted

from prefect_crew.server._real_results import result_of, task_label
from prefect_crew.server.program import Answer, Run

__all__ = ["Bridge", "HumanInput", "feedback_text", "serve_flow_questions"]

_current: ContextVar[Bridge | None] = ContextVar("prefect_crew_bridge", default=None)

NOT_APPROVED = "This is not approved. Improve it."
"""What an agent hears when a person rejects its work without a word."""


class Bridge:
    """A run, for use from any thread. CrewAI hands the context on to its own threads, and so each finds its own.

    Args:
        run: The run.
        loop: The server's event loop.
        on_wait: Called on the loop when the run first waits for a person.
    """

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop, on_wait: Callable[[], None]) -> None:
        self.run = run
        self._loop = loop
        self._on_wait = on_wait
        self._stopped = False
        self._asking: set[Future[Answer]] = set()
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Make this the bridge of the current context."""
        _current.set(self)

    @property
    def stopped(self) -> bool:
        return self._stopped or self.run.stop_requested

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
        if self.stopped:
            raise HookAborted("the run was stopped", source="prefect-crew")

    def tell(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Have the loop call one of the run's methods, in order; not once the run was stopped."""
        if self.stopped:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(partial(function, *args, **kwargs))

    def ask(self, *, task_id: str, output: str) -> Answer:
        """Wait for a person, on a thread of CrewAI's.

        Raises:
            HookAborted: The run was stopped instead.
        """
        try:
            return self._ask(task_id, output).result()
        except CancelledError:
            raise HookAborted("the run was stopped", source="prefect-crew") from None

    async def ask_async(self, *, task_id: str, output: str) -> Answer:
        """Wait for a person, on an event loop of CrewAI's; raises what `ask` raises."""
        try:
            return await asyncio.wrap_future(self._ask(task_id, output))
        except asyncio.CancelledError:
            self.check()
            raise

    def _ask(self, task_id: str, output: str) -> Future[Answer]:
        with self._lock:
            self.check()
            future = asyncio.run_coroutine_threadsafe(self._wait(task_id, output), self._loop)
            self._asking.add(future)
        future.add_done_callback(self._asking.discard)
        return future

    def _wait(self, task_id: str, output: str) -> Coroutine[Any, Any, Answer]:
        async def wait() -> Answer:
            self._on_wait()
            return await self.run.ask(task_id=task_id, output=output)

        return wait()


class HumanInput(SyncHumanInputProvider):
    """Tasks with `human_input=True`: what a person approves is taken as it is, what they reject is done again."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def handle_feedback(self, formatted_answer: AgentFinish, context: ExecutorContext) -> AgentFinish:
        answer = formatted_answer
        while context.ask_for_human_input:
            said = self._bridge.ask(task_id=_asked_of(context), output=self._get_output_string(answer))
            if said.approve:
                break
            context.messages.append(context._format_feedback_message(said.feedback.strip() or NOT_APPROVED))
            answer = context._invoke_loop()
        context.ask_for_human_input = False
        return answer

    async def handle_feedback_async(self, formatted_answer: AgentFinish, context: AsyncExecutorContext) -> AgentFinish:
        answer = formatted_answer
        while context.ask_for_human_input:
            said = await self._bridge.ask_async(task_id=_asked_of(context), output=self._get_output_string(answer))
            if said.approve:
                break
            context.messages.append(context._format_feedback_message(said.feedback.strip() or NOT_APPROVED))
            answer = await context._ainvoke_loop()
        context.ask_for_human_input = False
        return answer


def _asked_of(context: ExecutorContext) -> str:
    return task_label(context.task) if context.task is not None else str(context.agent.role)


class _FlowQuestions:
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


def serve_flow_questions() -> None:
    """Become CrewAI's provider of feedback and input, unless the user has set one."""
    questions = _FlowQuestions()
    flow_config.hitl_provider = flow_config.hitl_provider or questions
    flow_config.input_provider = flow_config.input_provider or questions


def feedback_text(context: PendingFeedbackContext, answer: Answer) -> str:
    """Return what a flow hears of an answer.

    Where the feedback decides among outcomes (`emit`), CrewAI has a model read it: it must say whether the person
    approved. A person who names an outcome is taken at their word. Elsewhere the flow gets the person's own words,
    and a bare rejection is not silence, which to a flow means content.
    """
    said = answer.feedback.strip()
    verdict = "Approved" if answer.approve else "Rejected"
    if not context.emit:
        return said if said or answer.approve else verdict
    if said.casefold() in (outcome.casefold() for outcome in context.emit):
        return said
    return f"{verdict}: {said}" if said else verdict
