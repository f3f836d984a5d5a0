"""Sends webhooks and event streams, in the background and without retries, as the crew API's servers do.

A receiver that is slow, away or answers with an error costs the run nothing. The faults `lose`, `double` and `delay`
are carried out here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from prefect_crew.api._http import tls_context
from prefect_crew.api.models import TaskResult
from prefect_crew.server import bodies
from prefect_crew.server.bodies import Generation
from prefect_crew.server.execution import Execution, Question, Step
from prefect_crew.server.faults import Faults
from prefect_crew.server.hooks import Authentication, Stream, Target
from prefect_crew.server.wire import to_json

__all__ = ["BATCH_SECONDS", "CALLBACKS", "ReviewWebhook", "WebhookSender"]

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
            self._send("task", Target(url=hooks.task), bodies.task_body(run, value, self._generation))
        elif isinstance(value, Step) and hooks.step:
            self._send("step", Target(url=hooks.step), bodies.step_body(run, value, self._generation))
        elif isinstance(value, Question) and hooks.human:
            self._send("human", hooks.human, bodies.human_body(run, value, self._generation))
        elif what == "completed" and hooks.crew:
            self._send("crew", Target(url=hooks.crew), bodies.crew_body(run, self._generation))
        for index, stream in enumerate(hooks.streams):
            for type_ in bodies.stream_types(run, what):
                if not stream.events or type_ in stream.events:
                    self._stream(run, index, stream, bodies.stream_event(run, type_, value))
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
