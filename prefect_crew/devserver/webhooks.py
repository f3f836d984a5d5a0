"""Sends the webhooks of a run, as the crew API's servers do."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, cast

import httpx

from prefect_crew.client._transport import tls_context
from prefect_crew.client.models import TaskResult
from prefect_crew.devserver._json import to_json
from prefect_crew.devserver.faults import Faults
from prefect_crew.devserver.response_formats import documented_task
from prefect_crew.devserver.runs import Authentication, Execution, Question, Step, Stream, Target

Generation = Literal["first", "later"]


def task_body(run: Execution, task: TaskResult, generation: Generation) -> dict[str, Any]:
    """Return what the task webhook carries."""
    if generation == "first":
        return {"kickoff_id": run.id, "status": "completed", **documented_task(task)}
    raw: Any = task.raw
    known: Mapping[str, Any] = cast("Mapping[str, Any]", raw) if isinstance(raw, Mapping) else {}
    output = task.output or ""
    return {
        "description": task.description or "",
        "name": task.name,
        "expected_output": known.get("expected_output", ""),
        "summary": " ".join(output.split()[:10]) + ("..." if len(output.split()) > 10 else ""),
        "agent": task.agent,
        "output": output,
        "output_json": task.data,
        "kickoff_id": run.id,
        "meta": run.meta,
    }


def step_body(run: Execution, step: Step, generation: Generation) -> dict[str, Any]:
    """Return what the step webhook carries."""
    if generation == "first":
        kind = {"step_type": step.kind, "content": step.content}
        return {"kickoff_id": run.id, "task_id": step.task, "agent": step.agent, **kind}
    said = {"thought": "", "result": step.content} if step.tool else {"thought": step.content, "result": ""}
    asked = {"prompt": f"{step.task or 'task'} ({step.agent or 'agent'})", "tool": step.tool or "", "tool_input": ""}
    return {**asked, **said, "kickoff_id": run.id, "meta": run.meta}


def crew_body(run: Execution, generation: Generation) -> dict[str, Any]:
    """Return what the crew webhook carries; it is sent for completed runs only, since no failure body is documented."""
    if generation == "first":
        result = {"output": run.output or "", "tasks": [documented_task(task) for task in run.tasks]}
        time = {"execution_time": run.execution_time}
        return {"kickoff_id": run.id, "status": "completed", "result": result, **time, "meta": run.meta}
    usage = run.usage.model_dump(exclude_none=True) if run.usage else None
    result = {"result": run.output or "", "result_json": run.data, "token_usage": usage}
    return {"kickoff_id": run.id, **result, "meta": run.meta}


def human_body(run: Execution, question: Question, generation: Generation) -> dict[str, Any]:
    """Return what the human-input webhook carries."""
    if generation == "first":
        asked = {"execution_id": run.id, "task_id": question.task_id, "task_output": question.output}
    else:
        asked = {"kickoff_id": run.id, "task_id": question.task_id, "output": question.output}
    return {**asked, "meta": run.meta}


def stream_types(run: Execution, what: str) -> tuple[str, ...]:
    """Return the types of CrewAI's events that tell of something that `execution.Listener` is told."""
    return (*_TYPES.get(what, ()), *(_FLOW_TYPES.get(what, ()) if run.flow else ()))


def stream_event(run: Execution, type_: str, value: Any) -> dict[str, Any]:
    """Return one event of a stream."""
    return {
        "id": str(uuid.uuid4()),
        "execution_id": run.id,
        "timestamp": datetime.now(UTC).isoformat(),
        "type": type_,
        "data": {"meta": run.meta, **_data(run, type_, value)},
    }


_TYPES = {
    "started": ("crew_kickoff_started",),
    "task_started": ("task_started", "agent_execution_started"),
    "step": ("agent_logs_execution",),
    "task_ended": ("agent_execution_completed", "task_completed"),
    "waiting": ("human_feedback_requested",),
    "completed": ("crew_kickoff_completed",),
    "failed": ("crew_kickoff_failed",),
}
_FLOW_TYPES = {"completed": ("flow_finished",), "failed": ("method_execution_failed",)}
"""What a Flow's server sends besides."""


def _data(run: Execution, type_: str, value: Any) -> dict[str, Any]:
    if type_ == "crew_kickoff_started":
        return {"inputs": dict(run.inputs)}
    if type_ == "crew_kickoff_completed":
        total = run.usage.total_tokens if run.usage else None
        return {"output": run.output or "", **({} if total is None else {"total_tokens": total})}
    if type_ == "flow_finished":
        return {"result": run.output or ""}
    if type_ in ("crew_kickoff_failed", "method_execution_failed"):
        return {"error": run.error or ""}
    if isinstance(value, TaskResult):
        return {"task_name": value.name, "agent_role": value.agent, "output": value.output or ""}
    if isinstance(value, Step):
        return {"task_name": value.task, "agent_role": value.agent, "type": value.kind, "content": value.content}
    if isinstance(value, Question):
        return {"task_name": value.task_id, "output": value.output}
    return {"task_name": value, "agent_role": run.current_agent}


logger = logging.getLogger(__name__)

BATCH_SECONDS = 0.2
"""How long events of a stream that is not `realtime` are gathered; the end of the run sends them too."""

CALLBACKS = "/human_feedback_requests/"
"""What the path of a callback URL begins with; a token follows."""
_AT_ONCE = 32
_TIMEOUT = 10.0


@dataclass(frozen=True)
class ReviewWebhook:
    """Where a Flow's platform asks a person, and what it signs with. The first option approves."""

    url: str
    secret: str = field(repr=False)
    options: tuple[str, ...] = ("approve", "reject")

    def signature(self, body: bytes) -> dict[str, str]:
        """Return the headers that prove where a body comes from, and when."""
        now = str(int(time.time()))
        digest = hmac.new(self.secret.encode(), now.encode() + b"." + body, hashlib.sha256).hexdigest()
        return {"X-Timestamp": now, "X-Signature": f"sha256={digest}"}


class WebhookSender:
    """Sends what happens to runs to their targets; an `execution.Listener`.

    Attributes:
        sent: Deliveries by kind (task, step, crew, human, stream) and the HTTP status that answered; 0 for none.
    """

    def __init__(
        self, faults: Faults, *, generation: Generation = "first", review: ReviewWebhook | None = None
    ) -> None:
        self.review = review
        self.asked: dict[str, tuple[Execution, Question]] = {}
        self.sent: Counter[tuple[str, int]] = Counter()
        self._faults = faults
        self._generation: Generation = generation
        self._client: httpx.AsyncClient | None = None
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._closed = False

    def __call__(self, run: Execution, what: str, value: Any) -> None:
        """Send what this means for the targets of the run."""
        hooks = run.hooks
        if isinstance(value, Question) and self.review is not None:
            self._ask(run, value, self.review)
        if isinstance(value, TaskResult) and hooks.task:
            self._send("task", Target(url=hooks.task), task_body(run, value, self._generation))
        elif isinstance(value, Step) and hooks.step:
            self._send("step", Target(url=hooks.step), step_body(run, value, self._generation))
        elif isinstance(value, Question) and hooks.human:
            self._send("human", hooks.human, human_body(run, value, self._generation))
        elif what == "completed" and hooks.crew:
            self._send("crew", Target(url=hooks.crew), crew_body(run, self._generation))
        for index, stream in enumerate(hooks.streams):
            for type_ in stream_types(run, what):
                if not stream.events or type_ in stream.events:
                    self._stream(run, index, stream, stream_event(run, type_, value))
            if run.state.ended:
                self._flush(run.id, index, stream)

    def _stream(self, run: Execution, index: int, stream: Stream, event: dict[str, Any]) -> None:
        if stream.realtime:
            self._send("stream", stream, {"events": [event]})
            return
        batch = self._batches.setdefault((run.id, index), [])
        batch.append(event)
        if len(batch) == 1:
            asyncio.get_running_loop().call_later(BATCH_SECONDS, self._flush, run.id, index, stream)

    def _flush(self, run_id: str, index: int, stream: Stream) -> None:
        if batch := self._batches.pop((run_id, index), None):
            self._send("stream", stream, {"events": batch})

    def _ask(self, run: Execution, question: Question, review: ReviewWebhook) -> None:
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
        self._send("review", Target(url=review.url), body)

    def _send(self, kind: str, target: Target, body: dict[str, Any]) -> None:
        if self._closed:
            return
        met = {fault.name: fault for fault in self._faults.draw("webhook", f"webhook-{kind}")}
        if "lose" in met:
            return
        delay = float(met["delay"].value or 0) if "delay" in met else 0.0
        for _ in range(2 if "double" in met else 1):
            task = asyncio.create_task(self._deliver(kind, target, body, delay))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, kind: str, target: Target, body: dict[str, Any], delay: float) -> None:
        await asyncio.sleep(delay)
        async with self._gate:
            if self._client is None:
                self._client = httpx.AsyncClient(verify=tls_context(True), timeout=_TIMEOUT, trust_env=False)
            headers, auth = _credentials(target.authentication)
            content = to_json(body)
            if kind == "review" and self.review is not None:
                headers |= self.review.signature(content)
            try:
                answer = await self._client.post(target.url, content=content, headers=headers, auth=auth)
            except httpx.HTTPError as error:
                self.sent[kind, 0] += 1
                # Without the URL: whatever protects the receiver stands in it.
                logger.warning("The %s webhook was not delivered: %s", kind, type(error).__name__)
            else:
                self.sent[kind, answer.status_code] += 1

    def abandon(self) -> None:
        """Give up what is still on its way."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Give up what is still on its way, and wait until it has ended."""
        self.abandon()
        tasks = list(self._tasks)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _credentials(authentication: Authentication | None) -> tuple[dict[str, str], httpx.Auth]:
    json = {"Content-Type": "application/json"}
    if authentication is None:
        return json, httpx.Auth()
    if authentication.strategy == "bearer" and authentication.token is not None:
        return {**json, "Authorization": f"Bearer {authentication.token.get_secret_value()}"}, httpx.Auth()
    password = authentication.password.get_secret_value() if authentication.password else ""
    return json, httpx.BasicAuth(authentication.username or "", password)
