"""The receiver as an ASGI app: it verifies webhooks, writes what they bring into the crew database, and answers.

    POST /hooks/{kind}/{token}   200; 404 for a URL that is not ours, 415, 413, 400, 408; 503: not written
    POST /requests               the same; 404 without the platform's signature: the question of a Flow to a person
    GET  /answer/{id}            the page of a question, see answers.py
    POST /answer/{id}            the answer to it
    GET  /health                 200 while it runs

It reads no byte of a body before it has verified the token. It gives the same answer to a forged token, a stale token
and a wrong path. It keeps nothing, so several may serve one address.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import get_current_settings
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_crew._internal.clock import utcnow
from prefect_crew._internal.prefect_api import OneLine
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.blocks import find_crew
from prefect_crew.client._callbacks import FlowQuestion, parse_question, signed
from prefect_crew.exceptions import ConfigurationError, CrewError, ResponseFormatError, StoreError
from prefect_crew.receiver.answers import AnswerPages
from prefect_crew.receiver.bodies import BodyError, read_body
from prefect_crew.receiver.events import WebhookEvent, event_name, is_task_name, prefect_event, read_events
from prefect_crew.runs.database import in_store
from prefect_crew.runs.resolve import write_evidence
from prefect_crew.runs.reviews.callbacks import keep_callback
from prefect_crew.runs.reviews.questions import MOST_TEXT, digest
from prefect_crew.settings import CrewSettings
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.store.questions import FLOW
from prefect_crew.webhooks import REPORTED, WAKING, checked_secret, read_token

logger: OneLine = OneLine(logging.getLogger("prefect_crew.receiver"), {})

MAX_BODY = 1024 * 1024
"""Bytes of a body."""
PARSED_AT_ONCE = 256 * 1024
"""Bytes of a body that is parsed on the event loop; a larger one is parsed in a thread and holds up no other answer."""
LOAD_WITHIN = 5.0
"""Seconds to load a crew, whose token is masked in the text of a question."""
KNOWN_AFTER = (0.0, 1.0, 2.0, 4.0)
"""Pauses in seconds before a look for the run of a Flow's question: its kickoff may not be answered yet."""
CLOSE_WITHIN = 5.0
"""Seconds for events that Prefect's thread has not sent at the end."""


def create_receiver(secret: SecretStr | str | None = None, *, max_body: int = MAX_BODY) -> Starlette:
    """Return the receiver, to be served alone or mounted into your own app under any prefix.

    Args:
        secret: The secret that signed the URLs, or several separated by blanks; left out, the setting
            PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET.
        max_body: Bytes of a body; larger ones get 413.

    Raises:
        ConfigurationError: There is no secret, or it is too short; or no Prefect API is set.
    """
    signing_secret = secret if secret is not None else CrewSettings().webhook_secret
    if signing_secret is None:
        raise ConfigurationError(
            "The receiver has no secret: set PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET to the same value as where "
            'crews are kicked off. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    if not get_current_settings().api.url:  # nobody would read events on an embedded server
        raise ConfigurationError(
            "The receiver needs the Prefect API that your flows use. Set PREFECT_API_URL, such as "
            "http://127.0.0.1:4200/api, or choose a profile that has it."
        )
    receiver = _Receiver(SecretStr(checked_secret(signing_secret)), max_body)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        EventsWorker.instance()  # connects now: its thread drops events that wait for 7 s for the first connection
        yield
        await asyncio.to_thread(EventsWorker.drain_all, timeout=CLOSE_WITHIN)

    app = Starlette(
        routes=[
            Route("/hooks/{kind}/{token}", receiver.take_webhook, methods=["POST"]),
            Route("/requests", receiver.take_request, methods=["POST"]),
            Route("/answer/{id}", AnswerPages().respond, methods=["GET", "POST"]),
            Route("/health", receiver.health, methods=["GET"]),
        ],
        # Another path, another method.
        exception_handlers={404: receiver.nothing_here, 405: receiver.nothing_here},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Receiver:
    def __init__(self, secret: SecretStr, max_body: int) -> None:
        self._secret = secret
        self._max_body = max_body

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def nothing_here(self, _request: Request, _error: Exception) -> Response:
        return _refuse(404, "not found")

    async def take_webhook(self, request: Request) -> Response:
        """Take a crew's webhook, at a URL that this package has signed."""
        kind, token = request.path_params["kind"], request.path_params["token"]
        authorization = request.headers.get("authorization")
        hook = read_token(kind, token, self._secret, now=utcnow(), authorization=authorization)
        if hook is None:
            return _refuse(404, "not found")
        if not _is_json(request):
            return _refuse(415, "a webhook's body is JSON, not compressed")
        try:
            body = await read_body(request, self._max_body)
            is_large = len(body) > PARSED_AT_ONCE
            events = await asyncio.to_thread(read_events, hook, body) if is_large else read_events(hook, body)
        except BodyError as error:
            return _refuse(error.status, str(error))
        except ResponseFormatError:
            return _refuse(400, f"the body is not one of a {hook.kind} webhook")
        try:
            attempt = await in_store(attempts.get, hook.attempt)
            for event in events:
                if attempt is not None:  # else it was pruned
                    attempt = await _take(event, attempt) or attempt
        except (StoreError, *PREFECT_ERRORS) as error:
            return _not_written(error)
        return JSONResponse({"status": "accepted"})

    async def take_request(self, request: Request) -> Response:
        """Take the question of a Flow, from a webhook that its platform has signed."""
        secret, headers = CrewSettings().review_secret, request.headers
        timestamp = headers.get("x-timestamp") or headers.get("x-crewai-timestamp")
        signature = headers.get("x-signature") or headers.get("x-crewai-signature")
        if secret is None or not timestamp or not signature or not _is_json(request):
            return _refuse(404, "not found")
        try:
            body = await read_body(request, self._max_body)
            if not signed(secret, timestamp, signature, body, now=utcnow().timestamp()):
                return _refuse(404, "not found")
            question = parse_question(body)
        except BodyError as error:
            return _refuse(error.status, str(error))
        except ResponseFormatError:
            return _refuse(400, "this names no run, or no callback URL")
        try:
            if question is not None and not await _take_question(question):
                logger.warning("A Flow asks about run %r, which is not on record.", question.kickoff_id[:300])
        except (StoreError, *PREFECT_ERRORS) as error:
            return _not_written(error)
        return JSONResponse({"status": "accepted"})


async def _take(event: WebhookEvent, attempt: Attempt) -> Attempt | None:
    """Write an event of a run, the id under which the run goes on, and report an end or a question to Prefect once.

    Return the attempt as it is now, if it was changed.
    """
    hook, name, changed = event.hook, event_name(event), None
    if event.kickoff_id is not None and attempt.kickoff_id is None:
        # The URL names the attempt, so a run with this id is its run.
        changed = await write_evidence(attempt, event.kickoff_id)
        attempt = changed or attempt
    elif event.kickoff_id is not None and hook.round and hook.kind != "stream":
        is_known = event.kickoff_id in await in_store(attempts.ids_of, attempt.id)
        if not is_known:
            changed = (await in_store(attempts.continued, attempt, event.kickoff_id)).attempt
    if name in WAKING:
        body = None
        if event.usage is not None:
            # The id of a streamed event: it may be delivered twice.
            body = {"usage": event.usage.model_dump(exclude_none=True), "id": event.facts.get("id")}
        facts: dict[str, Any] = {"number": hook.round, "kickoff_id": event.kickoff_id, "body": body}
        question = await _question_of(event, attempt) if hook.kind == "human_input" else None
        await in_store(questions.take_webhook, attempt, name, **facts, question=question)
    if name in REPORTED:
        emit_event(**prefect_event(event, attempt))
    return changed


async def _question_of(event: WebhookEvent, attempt: Attempt) -> dict[str, Any]:
    """Return what a webhook tells of a question, without what may be secret."""
    task, output = event.task, None if attempt.secret_names else event.output
    if output is not None:
        # A crew may repeat its token. Whoever waits knows it, and masks what the status shows.
        try:
            crew = await asyncio.wait_for(find_crew(attempt), LOAD_WITHIN)
            output = output if crew is None else crew.redactor()(output)
        except (*PREFECT_ERRORS, CrewError, TimeoutError):
            output = None
    is_kept = output is not None and len(output) <= MOST_TEXT
    return {
        "task": task if task is not None and is_task_name(event.hook, attempt, task) else None,
        "text": output if is_kept else None,
        "marks": {"webhook": digest(event.kickoff_id, task, event.output)},
    }


async def _take_question(question: FlowQuestion) -> bool:
    """Write a Flow's question, and keep the URL for its answer. Return False if its run is not on record."""
    found: list[Attempt] = []
    for pause in KNOWN_AFTER:
        await asyncio.sleep(pause)
        found = await in_store(attempts.of_kickoff_id, question.kickoff_id)
        if found:
            break
    attempt = next((attempt for attempt in found if attempt.state is AttemptState.STARTED), None)
    if attempt is None:
        return bool(found)
    facts: dict[str, Any] = {"task": question.task_id, "options": [*question.options] or None}
    if not attempt.secret_names:
        crew = None
        with suppress(*PREFECT_ERRORS, CrewError, TimeoutError):
            crew = await asyncio.wait_for(find_crew(attempt), LOAD_WITHIN)
        if crew is None or crew.show == "full":
            mask = str if crew is None else crew.redactor()
            texts = {"text": question.output, "message": question.message}
            facts |= {name: mask(text) for name, text in texts.items() if text is not None and len(text) <= MOST_TEXT}
    asked = await in_store(questions.ask, attempt, 1, marks={FLOW: question.id}, **facts)
    await keep_callback(asked, question.callback_url)
    return True


def _refuse(status: int, error: str) -> Response:
    # The rest of a body that is not wanted is not waited for.
    return JSONResponse({"error": error}, status, headers={"Connection": "close"})


def _not_written(error: Exception) -> Response:
    logger.warning(
        "A webhook could not be written: %s", error if isinstance(error, CrewError) else type(error).__name__
    )
    return _refuse(503, "the webhook could not be written: send it again")


def _is_json(request: Request) -> bool:
    """Return whether the headers name plain JSON as the body's type, or name no type."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        return False
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media in ("", "application/json") or (media.startswith("application/") and media.endswith("+json"))
