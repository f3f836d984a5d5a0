"""A dev server whose questions are a Flow's: they go to a signed webhook, and are answered at a callback URL.

In the response format "live", which it has by default, the webhook is flat, as AMP sent it in October 2026. In
"documented" it has the nested shape of CrewAI's pages, which knows no output.
"""

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
        super().__init__(spec, **{"response_format": "live", **options})
        self.review, self._asked, self._send = review_webhook, dict[str, tuple[Run, Question]](), self._sender
        self.has_other_answer = False
        """Whether the platform has another answer: it refuses ours, and the Flow goes on later."""
        self._sender = self._listen
        call = partial(self._call, "resume", self._callback)
        self.asgi.router.routes.insert(0, Route(f"{CALLBACKS}{{token}}", call, methods=["POST"]))

    @property
    def is_flow(self) -> bool:
        return True

    def _listen(self, run: Run, event: str, value: Any) -> None:
        if isinstance(value, Question):
            self._spawn(self._ask(run, value))
        self._send(run, event, value)

    async def _ask(self, run: Run, question: Question) -> None:
        for fault in self.faults.draw("webhook", "webhook-review"):
            await asyncio.sleep(fault.value or 0 if fault.name == "delay" else 0)
        token = secrets.token_urlsafe(24)
        self._asked[token] = run, question
        facts = {
            "id": str(uuid.uuid4()),
            "flow_id": run.id,
            "method_name": question.task_id,
            "message": f"Please review {question.task_id}.",
            "state": {"id": run.id, **run.inputs},
            "metadata": {},
            "created_at": "2026-10-06T16:46:20Z",
        }
        callback = {"callback_url": f"{self.url}{CALLBACKS}{token}", "assigned_to_email": "ada@example.com"}
        if self._format.is_live:
            about = {"flow_class": "flows.Publish", "output": question.output, "emit": list(self.review.options)}
            deployment = {"deployment_id": 1, "deployment_name": "publish"}
            event = {"event_type": "new_request", "status": "pending", "response_token": token, **deployment}
            await self._post("X-CrewAI-", {**event, **facts, **about, **callback})
        else:
            request = {**facts, "emit_options": list(self.review.options)}
            deployment = {"id": 1, "name": "publish", "organization_id": 1}
            await self._post("X-", {"event": "new_request", "request": request, "deployment": deployment, **callback})

    async def _post(self, names: str, body: dict[str, Any]) -> None:
        content, now = json.dumps(body, default=str).encode(), str(int(time.time()))
        digest = hmac.new(self.review.secret.encode(), f"{now}.".encode() + content, hashlib.sha256).hexdigest()
        headers = {f"{names}Timestamp": now, f"{names}Signature": f"sha256={digest}"}
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
        if question.uuid not in run.questions or self.has_other_answer:
            message = "Feedback already provided via dashboard at 2026-10-06T16:50:00Z"
            raise _RefusedError(409, {"error": "already_responded", "message": message})
        options = self.review.options
        approve = not options or feedback.casefold().startswith(options[0].casefold())
        run.answer(question.uuid, Answer(approve, feedback))
        return _JSON({"status": "accepted", "request": {"status": "responded", "feedback": feedback}})

    async def _resume(self, request: Request) -> Response:
        raise _RefusedError(400, self._format.error("Execution not pending", "A Flow is answered at the callback URL."))
