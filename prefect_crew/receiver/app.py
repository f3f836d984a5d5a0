"""The receiver as an ASGI app: it verifies webhooks, writes what they bring into the crew database, and answers.

    POST /hooks/{kind}/{token}   200; 404 for a URL that is not ours, 413, 400, 408; 503: not written
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
import re
from typing import Any

from prefect.settings import get_current_settings
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_crew._internal.clock import utcnow
from prefect_crew._internal.prefect_api import OneLine
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.events import emit
from prefect_crew.blocks import find_crew
from prefect_crew.client._callbacks import FlowQuestion, parse_question, signed
from prefect_crew.exceptions import ConfigurationError, CrewError, ResponseFormatError, StoreError
from prefect_crew.receiver.answers import AnswerPages
from prefect_crew.receiver.bodies import BodyError, read_body
from prefect_crew.receiver.events import WebhookEvent, read_events
from prefect_crew.runs.database import in_store
from prefect_crew.runs.resolve import write_evidence
from prefect_crew.runs.reviews.callbacks import keep_callback
from prefect_crew.runs.reviews.questions import MOST_TEXT, digest, text_to_judge
from prefect_crew.settings import CrewSettings
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.store.questions import FLOW
from prefect_crew.webhooks import Hook, checked_secret, read_token

logger: OneLine = OneLine(logging.getLogger("prefect_crew.receiver"), {})

MAX_BODY = 1024 * 1024
"""Bytes of a body."""
LOAD_WITHIN = 5.0
"""Seconds to load a crew, whose token is masked in the text of a question."""
KNOWN_AFTER = (0.0, 1.0, 2.0, 4.0)
"""Pauses in seconds before a look for the run of a Flow's question: its kickoff may not be answered yet."""
_WORD = re.compile(r"[\w.-]{1,80}", re.ASCII)  # an id or one word: nobody writes an input into it


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
    app = Starlette(
        routes=[
            Route("/hooks/{kind}/{token}", receiver.take_webhook, methods=["POST"]),
            Route("/requests", receiver.take_request, methods=["POST"]),
            Route("/answer/{id}", AnswerPages().respond, methods=["GET", "POST"]),
            Route("/health", receiver.health, methods=["GET"]),
        ],
        # Another path, another method.
        exception_handlers={404: receiver.nothing_here, 405: receiver.nothing_here},
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
        hook = read_token(kind, token, self._secret, now=utcnow())
        if hook is None:
            return _refuse(404, "not found")
        try:
            events = read_events(kind, await read_body(request, self._max_body))
            attempt = await in_store(attempts.get, hook.attempt)
            for event in events:
                if attempt is not None:  # else it was pruned
                    attempt = await _take(event, hook, attempt)
        except BodyError as error:
            return _refuse(error.status, str(error))
        except ResponseFormatError:
            return _refuse(400, f"the body is not one of a {kind} webhook")
        except (StoreError, *PREFECT_ERRORS) as error:
            return _not_written(error)
        return JSONResponse({"status": "accepted"})

    async def take_request(self, request: Request) -> Response:
        """Take the question of a Flow, from a webhook that its platform has signed."""
        secret, headers = CrewSettings().review_secret, request.headers
        timestamp = headers.get("x-timestamp") or headers.get("x-crewai-timestamp")
        signature = headers.get("x-signature") or headers.get("x-crewai-signature")
        if secret is None or not timestamp or not signature:
            return _refuse(404, "not found")
        try:
            body = await read_body(request, self._max_body)
            if not signed(secret, timestamp, signature, body, now=utcnow().timestamp()):
                return _refuse(404, "not found")
            question = parse_question(body)
            if question is not None and not await _take_question(question):
                logger.warning("A Flow asks about run %r, which is not on record.", question.kickoff_id[:300])
        except BodyError as error:
            return _refuse(error.status, str(error))
        except ResponseFormatError:
            return _refuse(400, "this names no run, or no callback URL")
        except (StoreError, *PREFECT_ERRORS) as error:
            return _not_written(error)
        return JSONResponse({"status": "accepted"})


async def _take(event: WebhookEvent, hook: Hook, attempt: Attempt) -> Attempt:
    """Write an event of a run, and the id under which the run goes on, and emit it. Return the attempt as it is now."""
    id_ = event.kickoff_id
    if id_ is not None and attempt.kickoff_id is None:
        # The URL names the attempt, so a run with this id is its run.
        attempt = await write_evidence(attempt, id_) or attempt
    elif (
        id_ is not None
        and hook.round
        and hook.kind != "stream"
        and id_ not in await in_store(attempts.ids_of, attempt.id)
    ):
        attempt = (await in_store(attempts.continued, attempt, id_)).attempt or attempt
    question = body = None
    if hook.kind == "human_input":
        question = await _facts(attempt, hook.texts, event.task, text=event.output)
        question["marks"] = {"webhook": digest(id_, event.task, event.output)}
    if event.usage is not None:  # with the id of a streamed event, since it may be delivered twice
        body = {"usage": event.usage.model_dump(exclude_none=True), "id": event.id}
    facts: dict[str, Any] = {"number": hook.round, "kickoff_id": id_, "body": body, "question": question}
    await in_store(questions.take_webhook, attempt, event.kind, **facts)
    if not event.kind.endswith(".crew_kickoff_completed"):  # the crew webhook says it too
        emit(event.kind, attempt, once=question is None, round=hook.round)
    return attempt


async def _take_question(question: FlowQuestion) -> bool:
    """Keep the URL for the answer to a Flow's question, and write the question. Return False if its run is not on
    record."""
    found: list[Attempt] = []
    for pause in KNOWN_AFTER:
        await asyncio.sleep(pause)
        if found := await in_store(attempts.of_kickoff_id, question.kickoff_id):
            break
    attempt = next((attempt for attempt in found if attempt.state is AttemptState.STARTED), None)
    if attempt is not None:
        await keep_callback(question.id, question.callback_url)
        facts = await _facts(attempt, True, question.task_id, text=text_to_judge(question), message=question.message)
        options = [*question.options] or None
        await in_store(questions.ask, attempt, 1, marks={FLOW: question.id}, options=options, **facts)
    return bool(found)


async def _facts(attempt: Attempt, with_texts: bool, task: str | None, **texts: str | None) -> dict[str, Any]:
    """Return what the crew database may have of a question: no token, and no text of a run with secret inputs."""
    facts: dict[str, Any] = {"task": task if task is not None and _WORD.fullmatch(task) else None}
    if attempt.secret_names or not with_texts:
        return facts
    try:
        # A crew may repeat its token. Where the crew is not stored, whoever waits masks what it shows.
        crew = await asyncio.wait_for(find_crew(attempt), LOAD_WITHIN)
    except (*PREFECT_ERRORS, CrewError, TimeoutError):
        return facts
    if crew is not None and crew.show != "full":
        return facts
    mask = str if crew is None else crew.redactor()
    return {name: text and mask(text) for name, text in {"task": task, **texts}.items() if len(text or "") <= MOST_TEXT}


def _refuse(status: int, error: str) -> Response:
    # The rest of a body that is not wanted is not waited for.
    return JSONResponse({"error": error}, status, headers={"Connection": "close"})


def _not_written(error: Exception) -> Response:
    logger.warning(
        "A webhook could not be written: %s", error if isinstance(error, CrewError) else type(error).__name__
    )
    return _refuse(503, "the webhook could not be written: send it again")
