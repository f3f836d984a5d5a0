"""The receiver as an ASGI app: it verifies, cuts down, hands on and answers. It knows nothing of Prefect.

    POST /requests               200; 404 for whatever is not signed by the platform: what a Flow asks a person
    POST /hooks/{kind}/{token}   200; 404 for whatever is not ours, 415, 413, 400, 408
    GET  /health                 200 while it runs
    GET  /ready                  200 while what it takes reaches somebody, 503 else; with counters

An answer waits for nobody: what is to be done about a delivery is done in the background. Until the token is verified
no byte of a body is read, and nothing tells a forged token from a stale one or from a wrong path.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Protocol

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_crew.client._callbacks import FeedbackRequest, parse_request, signed
from prefect_crew.client._parsing import parse_webhook
from prefect_crew.exceptions import ConfigurationError, ResponseFormatError
from prefect_crew.receiver.events import News, digest_of, news_of
from prefect_crew.records.model import utcnow
from prefect_crew.settings import CrewSettings
from prefect_crew.webhooks import Hook, checked_secret, read_token

MAX_BODY = 1024 * 1024
"""Bytes."""
PARSED_AT_ONCE = 256 * 1024
"""Bytes of a body that is parsed on the event loop; a larger one holds up no other answer."""
BODY_TIMEOUT = 10.0
"""Seconds for a whole body."""
REMEMBERED = 20_000
"""Deliveries that are known again when they come twice: 32 bytes of each are kept."""


class HandsOn(Protocol):
    """What takes the news and does something about it. None of its methods waits or raises."""

    def start(self) -> None:
        """Begin to hand on; harmless if it has begun."""
        ...

    def keep(self, request: FeedbackRequest) -> None:
        """Take what a Flow asks of a person."""
        ...

    def put(self, news: News) -> None:
        """Take a piece of news."""
        ...

    @property
    def ready(self) -> bool:
        """Whether what is taken reaches somebody."""
        ...

    def report(self) -> dict[str, Any]:
        """Return counters for people, JSON values."""
        ...

    async def aclose(self) -> None:
        """Hand on what is left, for some seconds at most, and end."""
        ...


def create_receiver(
    secret: SecretStr | str | None = None,
    *,
    max_body: int = MAX_BODY,
    body_timeout: float = BODY_TIMEOUT,
    hand_on: HandsOn | None = None,
    now: Callable[[], datetime] = utcnow,
) -> Starlette:
    """Return the receiver, to be served alone or mounted into your own app under any prefix.

    `app.state.hand_on` is what hands on; where the app is mounted, no server tells it of its end, so call
    `await app.state.hand_on.aclose()` when your app shuts down.

    Args:
        secret: What URLs were signed with; left out, the setting PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET.
        max_body: Bytes of a body; larger ones get 413.
        body_timeout: Seconds for a whole body; slower ones get 408.
        hand_on: What is done with the news; left out, they become events on the Prefect server.
        now: The clock that expiry is compared with.

    Raises:
        ConfigurationError: There is no secret, or it is too short; or no Prefect API is set.
    """
    chosen = secret if secret is not None else CrewSettings().webhook_secret
    if chosen is None:
        raise ConfigurationError(
            "The receiver has no secret: set PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET to the same value as where "
            'crews are kicked off. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    if hand_on is None:
        from prefect_crew.receiver.forward import Handover

        hand_on = Handover()
    receiver = _Receiver(SecretStr(checked_secret(chosen)), hand_on, max_body, body_timeout, now)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        hand_on.start()
        try:
            yield
        finally:
            await hand_on.aclose()

    app = Starlette(
        routes=[
            Route("/hooks/{kind}/{token}", receiver.take, methods=["POST"]),
            Route("/requests", receiver.ask, methods=["POST"]),
            Route("/health", receiver.health, methods=["GET"]),
            Route("/ready", receiver.ready, methods=["GET"]),
        ],
        # Whatever is not there: another path, another method.
        exception_handlers={404: receiver.nothing_here, 405: receiver.nothing_here},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.hand_on = hand_on
    return app


class _Receiver:
    def __init__(
        self, secret: SecretStr, hand_on: HandsOn, max_body: int, body_timeout: float, now: Callable[[], datetime]
    ) -> None:
        self._secret = secret
        self._hand_on = hand_on
        self._max_body = max_body
        self._body_timeout = body_timeout
        self._now = now
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._answers: Counter[int] = Counter()

    async def health(self, request: Request) -> Response:
        del request
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        del request
        ready = self._hand_on.ready
        answers = {str(status): count for status, count in sorted(self._answers.items())}
        return JSONResponse(
            {"ready": ready, "answers": answers, **self._hand_on.report()}, status_code=200 if ready else 503
        )

    async def nothing_here(self, request: Request, error: Exception) -> Response:
        del request, error
        return self._answer(404, "not found")

    async def ask(self, request: Request) -> Response:
        """Take what a Flow asks a person, from a webhook that its platform has signed."""
        secret, headers = CrewSettings().review_secret, request.headers
        timestamp = headers.get("x-timestamp") or headers.get("x-crewai-timestamp")
        signature = headers.get("x-signature") or headers.get("x-crewai-signature")
        if secret is None or not timestamp or not signature or not _is_json(request):
            return self._answer(404, "not found")
        try:
            body = await asyncio.wait_for(self._body(request), self._body_timeout)
        except (TimeoutError, ClientDisconnect):
            return self._answer(408, "the body did not come in time")
        if body is None:
            return self._answer(413, f"a webhook's body has at most {self._max_body} bytes")
        if not signed(secret, timestamp, signature, body, now=self._now().timestamp()):
            return self._answer(404, "not found")
        try:
            asked = parse_request(body)
        except ResponseFormatError:
            return self._answer(400, "this names no run, or no callback URL")
        if asked is not None:
            self._hand_on.keep(asked)
        return self._answer(200, None)

    async def take(self, request: Request) -> Response:
        hook = read_token(
            request.path_params["kind"],
            request.path_params["token"],
            self._secret,
            now=self._now(),
            authorization=request.headers.get("authorization"),
        )
        if hook is None:
            return self._answer(404, "not found")
        if not _is_json(request):
            return self._answer(415, "a webhook's body is JSON, not compressed")
        try:
            body = await asyncio.wait_for(self._body(request), self._body_timeout)
        except TimeoutError:
            return self._answer(408, "the body did not come in time")
        except ClientDisconnect:
            return self._answer(400, "the connection was closed")
        if body is None:
            return self._answer(413, f"a webhook's body has at most {self._max_body} bytes")
        return await self._taken(hook, body)

    async def _taken(self, hook: Hook, body: bytes) -> Response:
        digest = digest_of(hook, body)
        if digest not in self._seen:
            try:
                if len(body) > PARSED_AT_ONCE:
                    parsed = await asyncio.to_thread(parse_webhook, hook.kind, body)
                else:
                    parsed = parse_webhook(hook.kind, body)
            except ResponseFormatError:
                return self._answer(400, f"this is no {hook.kind} webhook's body")
            if digest in self._seen:  # it came twice at once
                return self._answer(200, None)
            for news in news_of(hook, parsed, digest=digest, received=self._now()):
                self._hand_on.put(news)
            self._seen[digest] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        return self._answer(200, None)

    async def _body(self, request: Request) -> bytes | None:
        """Return the body, None if it is too large. What is said of its length is not believed either."""
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > self._max_body:
            return None
        parts = bytearray()
        async for part in request.stream():
            parts += part
            if len(parts) > self._max_body:
                return None
        return bytes(parts)

    def _answer(self, status: int, error: str | None) -> Response:
        self._answers[status] += 1
        if error is None:
            return JSONResponse({"status": "accepted"}, status)
        # The rest of a body that is not wanted is not waited for.
        return JSONResponse({"error": error}, status, headers={"Connection": "close"})


def _is_json(request: Request) -> bool:
    """Whether the body claims to be plain JSON, or claims nothing."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        return False
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media in ("", "application/json", "text/json") or (
        media.startswith("application/") and media.endswith("+json")
    )
