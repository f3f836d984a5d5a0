"""A dev server whose questions are a Flow's: they go to a signed webhook, and are answered at a callback URL."""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prefect_crew.devserver import Answer, CrewServer, Run
from prefect_crew.devserver._runs import Question
from prefect_crew.devserver._server import _JSON, _RefusedError

CALLBACKS = "/human_feedback_requests/"


@dataclass(frozen=True)
class ReviewWebhook:
    """The URL of the webhook, and the secret that signs it. The first of `options` approves."""

    url: str
    secret: str = field(repr=False)
    options: tuple[str, ...] = ("approve", "reject")


class _Callback(BaseModel, extra="ignore"):
    feedback: str


class ReviewingServer(CrewServer):
    """A dev server that asks by `review_webhook`."""

    def __init__(self, spec: Any, *, review_webhook: ReviewWebhook, **options: Any) -> None:
        super().__init__(spec, **options)
        self.review, self._asked, self._send = review_webhook, dict[str, tuple[Run, Question]](), self._sender
        self._sender = self._listen
        call = partial(self._call, "resume", self._callback)
        self.asgi.router.routes.insert(0, Route(f"{CALLBACKS}{{token}}", call, methods=["POST"]))

    def _listen(self, run: Run, event: str, value: Any) -> None:
        if isinstance(value, Question):
            self._spawn(self._ask(run, value))
        self._send(run, event, value)

    async def _ask(self, run: Run, question: Question) -> None:
        for fault in self.faults.draw("webhook", "webhook-review"):
            await asyncio.sleep(fault.value or 0 if fault.name == "delay" else 0)
        token, now = secrets.token_urlsafe(24), str(int(time.time()))
        self._asked[token] = run, question
        body = {
            "event_type": "new_request",
            "id": str(uuid.uuid4()),
            "status": "pending",
            "method_name": question.task_id,
            "message": f"Please review {question.task_id}.",
            "output": question.output,
            "emit_options": list(self.review.options),
            "state": dict(run.inputs),
            "flow_execution_id": run.id,
            "callback_url": f"{self.url}{CALLBACKS}{token}",
        }
        content = json.dumps(body, default=str).encode()
        digest = hmac.new(self.review.secret.encode(), f"{now}.".encode() + content, hashlib.sha256).hexdigest()
        headers = {"Content-Type": "application/json", "X-Timestamp": now, "X-Signature": f"sha256={digest}"}
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(self.review.url, content=content, headers=headers)

    def _has_token(self, request: Request) -> bool:
        # The URL of a callback holds a token of its own.
        return request.url.path.startswith(CALLBACKS) or super()._has_token(request)

    async def _callback(self, request: Request) -> Response:
        feedback = (await self._read(request, _Callback))[0].feedback
        if request.path_params["token"] not in self._asked:
            raise _RefusedError(401, self._format.error("unauthorized", "Invalid response token"))
        run, question = self._asked[request.path_params["token"]]
        if question.uuid not in run.questions:
            raise _RefusedError(409, self._format.error("already_responded", "Feedback was already provided."))
        options = self.review.options
        approve = not options or feedback.casefold().startswith(options[0].casefold())
        run.answer(question.uuid, Answer(approve, feedback))
        return _JSON({"status": "accepted", "request": {"status": "responded", "feedback": feedback}})

    async def _resume(self, request: Request) -> Response:
        raise _RefusedError(400, self._format.error("Execution not pending", "A Flow is answered at the callback URL."))
