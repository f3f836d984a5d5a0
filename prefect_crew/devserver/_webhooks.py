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
from prefect_crew.devserver._runs import Question, Run, Spawn, Step

Generation = Literal["first", "later"]
"""How the bodies of webhooks are worded."""
CALLBACKS = "/human_feedback_requests/"
"""What the path of a callback URL ends with, before its token."""

_MAX_CONCURRENT = 32
_TIMEOUT = 10.0

logger = logging.getLogger(__name__)


def _task_body(run: Run, task: TaskResult, generation: Generation) -> dict[str, Any]:
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


def _step_body(run: Run, step: Step, generation: Generation) -> dict[str, Any]:
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


def _crew_body(run: Run, generation: Generation) -> dict[str, Any]:
    """It is sent for completed runs only, since no failure body is documented."""
    if generation == "first":
        ended = {"status": "completed", "result": documented_result(run), "execution_time": run.execution_time}
        return {"kickoff_id": run.id, **ended, "meta": run.meta}
    result = {"result": run.output or "", "result_json": run.data, "token_usage": _counts(run.usage)}
    return {"kickoff_id": run.id, **result, "meta": run.meta}


def _human_body(run: Run, question: Question, generation: Generation) -> dict[str, Any]:
    id_, output = ("execution_id", "task_output") if generation == "first" else ("kickoff_id", "output")
    return {id_: run.id, "task_id": question.task_id, output: question.output, "meta": run.meta}


def _counts(usage: TokenUsage | None) -> dict[str, int] | None:
    return usage.model_dump(exclude_none=True) if usage else None


_EVENT_TYPES = {
    "started": ("crew_kickoff_started",),
    "task_started": ("task_started", "agent_execution_started"),
    "step": ("agent_logs_execution",),
    "task_ended": ("agent_execution_completed", "task_completed"),
    "called": ("llm_call_completed",),
    "waiting": ("human_feedback_requested",),
    "completed": ("crew_kickoff_completed", "flow_finished"),
    "failed": ("crew_kickoff_failed", "method_execution_failed"),
}
"""The types of CrewAI's events by what the sender, a `runs.Listener`, hears."""
_OF_FLOWS = ("flow_finished", "method_execution_failed")


def _event_data(run: Run, type_: str, value: Any) -> dict[str, Any]:
    match type_, value:
        case "crew_kickoff_started", _:
            return {"inputs": dict(run.inputs)}
        case "crew_kickoff_completed", _:
            total = run.usage.total_tokens if run.usage else None
            return {"output": run.output or "", **({} if total is None else {"total_tokens": total})}
        case "flow_finished", _:
            return {"result": run.output or ""}
        case (("crew_kickoff_failed" | "method_execution_failed"), _):
            return {"error": run.error or ""}
        case "llm_call_completed", (str(model), TokenUsage() as usage):
            said = {"messages": [{"role": "user", "content": str(dict(run.inputs))}], "response": "…"}
            return {"model": model, "call_type": "llm_call", "usage": _counts(usage), **said}
        case _, TaskResult():
            return {"task_name": value.name, "agent_role": value.agent, "output": value.output or ""}
        case _, Step():
            return {"task_name": value.task, "agent_role": value.agent, "type": value.kind, "content": value.content}
        case _, Question():
            return {"task_name": value.task_id, "output": value.output}
        case _:
            return {"task_name": value, "agent_role": run.current_agent}


def _stream_body(run: Run, type_: str, value: Any) -> dict[str, Any]:
    event = {
        "id": str(uuid.uuid4()),
        "execution_id": run.id,
        "timestamp": datetime.now(UTC).isoformat(),
        "type": type_,
        "data": {"meta": run.meta, **_event_data(run, type_, value)},
    }
    return {"events": [event]}


@dataclass(frozen=True)
class ReviewWebhook:
    """Where a Flow's platform asks a person, and the secret that it signs with. The first option approves."""

    url: str
    secret: str = field(repr=False)
    options: tuple[str, ...] = ("approve", "reject")


class WebhookSender:
    """Sends what happens to runs to their targets; a `Listener`. `asked` has questions by the tokens of callbacks."""

    def __init__(self, faults: Faults, *, spawn: Spawn, generation: Generation, review: ReviewWebhook | None) -> None:
        self.review = review
        self.asked: dict[str, tuple[Run, Question]] = {}
        self._faults = faults
        self._spawn = spawn
        self._generation: Generation = generation
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)

    def open(self) -> None:
        """Begin to send, on this event loop."""
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)

    def __call__(self, run: Run, event: str, value: Any) -> None:
        """Send what this means for the targets of the run."""
        targets, generation = run.targets, self._generation
        if isinstance(value, TaskResult) and targets.task:
            self._send("task", targets.task, _task_body(run, value, generation))
        elif isinstance(value, Step) and targets.step:
            self._send("step", targets.step, _step_body(run, value, generation))
        elif isinstance(value, Question):
            if self.review is not None:
                self._send("review", self.review.url, self._request(run, value, self.review))
            if human := targets.human_input:
                url, authentication = (human, None) if isinstance(human, str) else (human.url, human.authentication)
                self._send("human", url, _human_body(run, value, generation), authentication)
        elif event == "completed" and targets.crew:
            self._send("crew", targets.crew, _crew_body(run, generation))
        if (stream := targets.stream) is not None:
            for type_ in _EVENT_TYPES.get(event, ()):
                if type_ in stream.events and (run.is_flow or type_ not in _OF_FLOWS):
                    self._send("stream", stream.url, _stream_body(run, type_, value), stream.authentication)

    def _request(self, run: Run, question: Question, review: ReviewWebhook) -> dict[str, Any]:
        token = secrets.token_urlsafe(24)
        self.asked[token] = run, question
        return {
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

    def _send(
        self, kind: str, url: str, body: dict[str, Any], authentication: BearerAuth | BasicAuth | None = None
    ) -> None:
        drawn = {fault.name: fault.value or 0.0 for fault in self._faults.draw("webhook", f"webhook-{kind}")}
        if "lose" in drawn:
            return
        content = json.dumps(body, default=str).encode()
        headers, auth = {"Content-Type": "application/json"}, httpx.Auth()
        if isinstance(authentication, BearerAuth):
            headers["Authorization"] = f"Bearer {authentication.token.get_secret_value()}"
        elif authentication is not None:
            auth = httpx.BasicAuth(authentication.username, authentication.password.get_secret_value())
        if kind == "review" and self.review is not None:
            now = str(int(time.time()))
            digest = hmac.new(self.review.secret.encode(), f"{now}.".encode() + content, hashlib.sha256).hexdigest()
            headers |= {"X-Timestamp": now, "X-Signature": f"sha256={digest}"}
        for _ in range(2 if "double" in drawn else 1):
            delay = drawn.get("delay", 0.0)
            self._spawn(self._deliver(kind, url, delay, content=content, headers=headers, auth=auth))

    async def _deliver(self, kind: str, url: str, delay: float, **request: Any) -> None:
        await asyncio.sleep(delay)
        options: dict[str, Any] = {"verify": tls_context(), "timeout": _TIMEOUT, "trust_env": False}
        async with self._slots, httpx.AsyncClient(**options) as client:
            try:
                await client.post(url, **request)
            except httpx.HTTPError as error:
                # Without the URL: it may hold all that protects the receiver.
                logger.warning("The %s webhook was not delivered: %s", kind, type(error).__name__)
