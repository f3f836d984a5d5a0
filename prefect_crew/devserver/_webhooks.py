"""The webhooks of a run: their bodies in both generations, the event streams, and how they are sent."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import httpx

from prefect_crew.client._transport import tls_context
from prefect_crew.client.models import TaskResult, TokenUsage
from prefect_crew.client.webhooks import BasicAuth, BearerAuth
from prefect_crew.devserver._faults import Faults
from prefect_crew.devserver._response_formats import documented_result, documented_task
from prefect_crew.devserver._runs import Question, Run, Step

Generation = Literal["first", "later"]

logger = logging.getLogger(__name__)

CALLBACKS = "/human_feedback_requests/"
"""What the path of a callback URL begins with; a token follows."""
_MAX_CONCURRENT = 32
_TIMEOUT = 10.0


def task_body(run: Run, task: TaskResult, generation: Generation) -> dict[str, Any]:
    """Return the body of the task webhook."""
    if generation == "first":
        return {"kickoff_id": run.id, "status": "completed", **documented_task(task)}
    raw: Any = task.raw or {}
    output = task.output or ""
    words = output.split()
    return {
        "description": task.description or "",
        "name": task.name,
        "expected_output": raw.get("expected_output", ""),
        "summary": " ".join(words[:10]) + ("..." if len(words) > 10 else ""),
        "agent": task.agent,
        "output": output,
        "output_json": task.data,
        "kickoff_id": run.id,
        "meta": run.meta,
    }


def step_body(run: Run, step: Step, generation: Generation) -> dict[str, Any]:
    """Return the body of the step webhook."""
    if generation == "first":
        kind = {"step_type": step.kind, "content": step.content}
        return {"kickoff_id": run.id, "task_id": step.task, "agent": step.agent, **kind}
    return {
        "prompt": f"{step.task or 'task'} ({step.agent or 'agent'})",
        "thought": "" if step.tool else step.content,
        "tool": step.tool or "",
        "tool_input": "",
        "result": step.content if step.tool else "",
        "kickoff_id": run.id,
        "meta": run.meta,
    }


def crew_body(run: Run, generation: Generation) -> dict[str, Any]:
    """Return the body of the crew webhook. It is sent for completed runs only, since no failure body is documented."""
    if generation == "first":
        ended = {"status": "completed", "result": documented_result(run), "execution_time": run.execution_time}
        return {"kickoff_id": run.id, **ended, "meta": run.meta}
    usage = run.usage.model_dump(exclude_none=True) if run.usage else None
    result = {"result": run.output or "", "result_json": run.data, "token_usage": usage}
    return {"kickoff_id": run.id, **result, "meta": run.meta}


def human_body(run: Run, question: Question, generation: Generation) -> dict[str, Any]:
    """Return the body of the human-input webhook."""
    id_, output = ("execution_id", "task_output") if generation == "first" else ("kickoff_id", "output")
    return {id_: run.id, "task_id": question.task_id, output: question.output, "meta": run.meta}


_EVENT_TYPES = {
    "started": ("crew_kickoff_started",),
    "task_started": ("task_started", "agent_execution_started"),
    "step": ("agent_logs_execution",),
    "task_ended": ("agent_execution_completed", "task_completed"),
    "called": ("llm_call_completed",),
    "waiting": ("human_feedback_requested",),
    "completed": ("crew_kickoff_completed",),
    "failed": ("crew_kickoff_failed",),
}
"""The types of CrewAI's events by what the sender, a `runs.Listener`, hears."""
_FLOW_EVENT_TYPES = {"completed": ("flow_finished",), "failed": ("method_execution_failed",)}
"""Those that a Flow's server sends as well."""


def _stream_event(run: Run, type_: str, value: Any) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "execution_id": run.id,
        "timestamp": datetime.now(UTC).isoformat(),
        "type": type_,
        "data": {"meta": run.meta, **_event_data(run, type_, value)},
    }


def _event_data(run: Run, type_: str, value: Any) -> dict[str, Any]:
    match type_, value:
        case "crew_kickoff_started", _:
            return {"inputs": dict(run.inputs)}
        case "crew_kickoff_completed", _:
            total = run.usage.total_tokens if run.usage else None
            return {"output": run.output or "", **({} if total is None else {"total_tokens": total})}
        case "llm_call_completed", (str(model), TokenUsage() as usage):
            content = {"messages": [{"role": "user", "content": str(dict(run.inputs))}], "response": "…"}
            return {"model": model, "call_type": "llm_call", "usage": usage.model_dump(exclude_none=True), **content}
        case "flow_finished", _:
            return {"result": run.output or ""}
        case (("crew_kickoff_failed" | "method_execution_failed"), _):
            return {"error": run.error or ""}
        case _, TaskResult():
            return {"task_name": value.name, "agent_role": value.agent, "output": value.output or ""}
        case _, Step():
            return {"task_name": value.task, "agent_role": value.agent, "type": value.kind, "content": value.content}
        case _, Question():
            return {"task_name": value.task_id, "output": value.output}
        case _:
            return {"task_name": value, "agent_role": run.current_agent}


@dataclass(frozen=True)
class ReviewWebhook:
    """Where a Flow's platform asks a person, and the secret that it signs with. The first option approves."""

    url: str
    secret: str = field(repr=False)
    options: tuple[str, ...] = ("approve", "reject")

    def signature(self, body: bytes) -> dict[str, str]:
        """Return the headers that prove where a body comes from, and when."""
        now = str(int(time.time()))
        digest = hmac.new(self.secret.encode(), now.encode() + b"." + body, hashlib.sha256).hexdigest()
        return {"X-Timestamp": now, "X-Signature": f"sha256={digest}"}

    def approves(self, feedback: str) -> bool:
        """Return whether a person's words approve."""
        return not self.options or feedback.casefold().startswith(self.options[0].casefold())


class WebhookSender:
    """Sends what happens to runs to their targets; a `runs.Listener`.

    Attributes:
        review: Asks people by a signed webhook as well.
        asked: The questions that it asked, by the token of their callback URL.
    """

    def __init__(
        self, faults: Faults, *, generation: Generation = "first", review: ReviewWebhook | None = None
    ) -> None:
        self.review = review
        self.asked: dict[str, tuple[Run, Question]] = {}
        self._faults = faults
        self._generation: Generation = generation
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = False

    def __call__(self, run: Run, event: str, value: Any) -> None:
        """Send what this means for the targets of the run."""
        targets, generation = run.targets, self._generation
        human, stream = targets.human_input, targets.stream
        if isinstance(value, Question) and self.review is not None:
            self._ask(run, value, self.review)
        if isinstance(value, TaskResult) and targets.task:
            self._send("task", targets.task, task_body(run, value, generation))
        elif isinstance(value, Step) and targets.step:
            self._send("step", targets.step, step_body(run, value, generation))
        elif isinstance(value, Question) and human:
            url, authentication = (human, None) if isinstance(human, str) else (human.url, human.authentication)
            self._send("human", url, human_body(run, value, generation), authentication)
        elif event == "completed" and targets.crew:
            self._send("crew", targets.crew, crew_body(run, generation))
        if stream is not None:
            types = _EVENT_TYPES.get(event, ()) + (_FLOW_EVENT_TYPES.get(event, ()) if run.is_flow else ())
            for type_ in types:
                if type_ in stream.events:
                    body = {"events": [_stream_event(run, type_, value)]}
                    self._send("stream", stream.url, body, stream.authentication)

    def _ask(self, run: Run, question: Question, review: ReviewWebhook) -> None:
        token = secrets.token_urlsafe(24)
        self.asked[token] = run, question
        body = {
            "event_type": "new_request",
            "id": str(uuid.uuid4()),
            "status": "pending",
            "method_name": question.task_id,
            "message": f"Please review {question.task_id}.",
            "output": question.output,
            "emit_options": list(review.options),
            "state": dict(run.inputs),
            "flow_execution_id": run.id,
            "callback_url": f"{run.base_url}{CALLBACKS}{token}",
        }
        self._send("review", review.url, body)

    def _send(
        self, kind: str, url: str, body: dict[str, Any], authentication: BearerAuth | BasicAuth | None = None
    ) -> None:
        if not self._is_open:
            return
        drawn = {fault.name: fault for fault in self._faults.draw("webhook", f"webhook-{kind}")}
        if "lose" in drawn:
            return
        delay = float(drawn["delay"].value or 0) if "delay" in drawn else 0.0
        for _ in range(2 if "double" in drawn else 1):
            task = asyncio.create_task(self._deliver(kind, url, body, authentication, delay))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(
        self, kind: str, url: str, body: dict[str, Any], authentication: BearerAuth | BasicAuth | None, delay: float
    ) -> None:
        await asyncio.sleep(delay)
        async with self._slots:
            if self._client is None:
                self._client = httpx.AsyncClient(verify=tls_context(), timeout=_TIMEOUT, trust_env=False)
            content = json.dumps(body, default=str).encode()
            headers, auth = {"Content-Type": "application/json"}, httpx.Auth()
            if isinstance(authentication, BearerAuth):
                headers["Authorization"] = f"Bearer {authentication.token.get_secret_value()}"
            elif authentication is not None:
                auth = httpx.BasicAuth(authentication.username, authentication.password.get_secret_value())
            if kind == "review" and self.review is not None:
                headers |= self.review.signature(content)
            try:
                await self._client.post(url, content=content, headers=headers, auth=auth)
            except httpx.HTTPError as error:
                # Without the URL: it may hold all that protects the receiver.
                logger.warning("The %s webhook was not delivered: %s", kind, type(error).__name__)

    def open(self) -> None:
        """Begin to send, on this event loop."""
        self._slots, self._is_open = asyncio.Semaphore(_MAX_CONCURRENT), True

    def abandon(self) -> None:
        """Give up what is still to be sent."""
        self._is_open = False
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Give up what is still to be sent, and wait for the end of it."""
        self.abandon()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None
