"""The receiver as an ASGI app: it verifies webhooks, cuts them down, wakes waits, and answers.

    POST /requests               200; 404 without the platform's signature: the question of a Flow to a person
    POST /hooks/{kind}/{token}   200; 404 for a URL that is not ours, 415, 413, 400, 408
    GET  /answer/{token}         the page of a question, see answers.py
    POST /answer/{token}         the answer to it
    GET  /recent?after=CURSOR    200 with the webhooks since then, for processes that wait for runs; 404, 503
    GET  /health                 200 while it runs
    GET  /ready                  200 while it takes questions, 503 else; with counters

No answer to a webhook waits for Prefect; only the pages of questions do. The receiver reads no byte of a body before it
has verified the token. It gives the same answer to a forged token, a stale token and a wrong path.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_crew.client._callbacks import parse_question, signed
from prefect_crew.exceptions import ConfigurationError, ResponseFormatError
from prefect_crew.receiver.answers import AnswerPages
from prefect_crew.receiver.bodies import BodyError, read_body
from prefect_crew.receiver.events import read_events
from prefect_crew.receiver.forward import Forwarder
from prefect_crew.records.model import utcnow
from prefect_crew.settings import CrewSettings
from prefect_crew.webhooks import checked_secret, may_read_recent, read_token

MAX_BODY = 1024 * 1024  # bytes
PARSED_AT_ONCE = 256 * 1024
"""Bytes of a body that is parsed on the event loop; a larger one is parsed in a thread and holds up no other answer."""


def create_receiver(
    secret: SecretStr | str | None = None, *, max_body: int = MAX_BODY, forwarder: Forwarder | None = None
) -> Starlette:
    """Return the receiver, to be served alone or mounted into your own app under any prefix.

    No server informs a mounted app of its end, so call `await app.state.forwarder.aclose()` when your app shuts down.

    Args:
        secret: The secret that signed the URLs, or several separated by blanks; left out, the setting
            PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET.
        max_body: Bytes of a body; larger ones get 413.
        forwarder: The object that wakes waits and makes Prefect's events; left out, one with its defaults.

    Raises:
        ConfigurationError: There is no secret, or it is too short; or no Prefect API is set.
    """
    signing_secret = secret if secret is not None else CrewSettings().webhook_secret
    if signing_secret is None:
        raise ConfigurationError(
            "The receiver has no secret: set PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET to the same value as where "
            'crews are kicked off. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    receiver = _Receiver(SecretStr(checked_secret(signing_secret)), forwarder or Forwarder(), max_body)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        receiver.forwarder.start()
        try:
            yield
        except asyncio.CancelledError:  # a second Ctrl-C waits for nothing
            return
        await receiver.forwarder.aclose()

    app = Starlette(
        routes=[
            Route("/hooks/{kind}/{token}", receiver.take_webhook, methods=["POST"]),
            Route("/requests", receiver.take_request, methods=["POST"]),
            Route("/answer/{token}", AnswerPages(receiver.secret).respond, methods=["GET", "POST"]),
            Route("/recent", receiver.recent, methods=["GET"]),
            Route("/health", receiver.health, methods=["GET"]),
            Route("/ready", receiver.ready, methods=["GET"]),
        ],
        # Another path, another method.
        exception_handlers={404: receiver.nothing_here, 405: receiver.nothing_here},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.forwarder = receiver.forwarder
    return app


class _Receiver:
    def __init__(self, secret: SecretStr, forwarder: Forwarder, max_body: int) -> None:
        self.forwarder = forwarder
        self.secret = secret
        self._max_body = max_body
        self._answers: Counter[int] = Counter()

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        ready = self.forwarder.is_ready
        answers = {str(status): count for status, count in sorted(self._answers.items())}
        body = {"ready": ready, "answers": answers, **self.forwarder.report()}
        return JSONResponse(body, status_code=200 if ready else 503)

    async def recent(self, request: Request) -> Response:
        """Answer a process that waits for runs, once there is a webhook or after some seconds."""
        if not may_read_recent(self.secret, request.headers.get("authorization")):
            return self._answer(404, "not found")
        answer = await self.forwarder.recent.after(request.query_params.get("after", ""))
        if answer is None:
            return self._answer(503, "too many processes wait here, so this one has to poll")
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    async def nothing_here(self, _request: Request, _error: Exception) -> Response:
        return self._answer(404, "not found")

    async def take_request(self, request: Request) -> Response:
        """Take the question of a Flow, from a webhook that its platform has signed."""
        secret, headers = CrewSettings().review_secret, request.headers
        timestamp = headers.get("x-timestamp") or headers.get("x-crewai-timestamp")
        signature = headers.get("x-signature") or headers.get("x-crewai-signature")
        if secret is None or not timestamp or not signature or not _is_json(request):
            return self._answer(404, "not found")
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        if not signed(secret, timestamp, signature, body, now=utcnow().timestamp()):
            return self._answer(404, "not found")
        try:
            question = parse_question(body)
        except ResponseFormatError:
            return self._answer(400, "this names no run, or no callback URL")
        if question is not None:
            self.forwarder.put(question)
        return self._answer(200)

    async def take_webhook(self, request: Request) -> Response:
        """Take a crew's webhook, at a URL that this package has signed."""
        kind, token = request.path_params["kind"], request.path_params["token"]
        authorization = request.headers.get("authorization")
        hook = read_token(kind, token, self.secret, now=utcnow(), authorization=authorization)
        if hook is None:
            return self._answer(404, "not found")
        if not _is_json(request):
            return self._answer(415, "a webhook's body is JSON, not compressed")
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        try:
            is_large = len(body) > PARSED_AT_ONCE
            events = await asyncio.to_thread(read_events, hook, body) if is_large else read_events(hook, body)
        except ResponseFormatError:
            return self._answer(400, f"the body is not one of a {hook.kind} webhook")
        for event in events:
            self.forwarder.put(event)
        return self._answer(200)

    async def _body(self, request: Request) -> bytes | Response:
        """Return the body, or the answer that refuses it."""
        try:
            return await read_body(request, self._max_body)
        except BodyError as error:
            return self._answer(error.status, str(error))

    def _answer(self, status: int, error: str | None = None) -> Response:
        self._answers[status] += 1
        if error is None:
            return JSONResponse({"status": "accepted"}, status)
        # The rest of a body that is not wanted is not waited for.
        return JSONResponse({"error": error}, status, headers={"Connection": "close"})


def _is_json(request: Request) -> bool:
    """Return whether the headers name plain JSON as the body's type, or name no type."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        return False
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media in ("", "application/json") or (media.startswith("application/") and media.endswith("+json"))
