"""The pages with which people answer the questions of crews, by a link and without access to Prefect.

    GET  /answer/{id}    the question, what is judged, a form; it changes nothing, since chat programs fetch links
    POST /answer/{id}    sends the answer, once

    200 the question, or: sent          404 unknown, expired, or sent by another site
    400, 408, 413 no whole form         409 the question has its answer, or is closed
    502 it may have arrived             503 not sent, or nothing can be read: try again

The id is random, and everybody who has it may answer. `answer_question` sends the answer, and the crew database says
that the question has one: a click, a form and the command line at the same time give one answer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from prefect_crew._internal.prefect_api import OneLine
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew._text import one_line, plain
from prefect_crew.blocks import find_crew
from prefect_crew.client._callbacks import READ_BY_A_MODEL, approves
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import Review, ReviewRequest
from prefect_crew.client.redaction import withholding
from prefect_crew.exceptions import AnswerUncertainError, ConfigurationError, CrewError, NotWaitingError
from prefect_crew.receiver.bodies import BodyError, read_body
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews.answer import MAX_NAME, answer_question, look
from prefect_crew.runs.reviews.questions import describe_answer, reviews_of
from prefect_crew.runs.run import LiveRun, read_status
from prefect_crew.store import attempts, questions

logger: OneLine = OneLine(logging.getLogger("prefect_crew.receiver"), {})

SHOWN = 20_000
"""Characters of a crew's text on a page."""
SHOWN_NAME = 200
"""Characters of a name or an option on a page."""
MAX_FEEDBACK = 10_000
"""Characters."""
MAX_FORM = 128 * 1024
"""Bytes."""
READ_WITHIN = 15.0
"""Seconds to read a question, from the crew database and the crew's server."""
ANSWER_WITHIN = 90.0
"""Seconds until a page says that nobody knows whether its answer arrived. It is sent on."""
NOBODY_NAMED = "an answer link"
"""The giver of an answer, if the person gave no name."""
_STYLE = files("prefect_crew.receiver").joinpath("answer.css").read_text(encoding="utf-8")
_PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    files("prefect_crew.receiver").joinpath("answer.html").read_text(encoding="utf-8")
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
    "Connection": "close",  # the rest of a body that is not wanted is not waited for
}


@dataclass(frozen=True)
class _Form:
    """A form as a person has sent it: texts of any content, bounded in size."""

    decision: str = ""
    feedback: str = ""
    name: str = ""

    def review(self, question: ReviewRequest) -> Review:
        """Return the answer.

        Raises:
            ConfigurationError: A field is missing or cannot be taken. The message is for the person.
        """
        options = {f"option-{number}": option for number, option in enumerate(question.options)}
        if self.decision not in (options or ("approve", "reject")):
            raise ConfigurationError("Choose an answer.")
        if len(self.feedback) > MAX_FEEDBACK:
            raise ConfigurationError(f"The feedback is too long: write at most {MAX_FEEDBACK:,} characters.")
        if self.decision == "reject" and not self.feedback.strip():
            raise ConfigurationError("A rejection needs feedback. Write what the crew has to do better.")
        option = options.get(self.decision)
        approve = self.decision == "approve" if option is None else approves(question.options, option)
        by = one_line(self.name)[:MAX_NAME] or NOBODY_NAMED
        return Review(approve=approve, feedback=self.feedback, option=option, by=by)


async def _read_form(request: Request) -> _Form:
    """Return the form in the body of a request. Raises BodyError."""
    body = (await read_body(request, MAX_FORM)).decode("utf-8", "replace")
    try:
        fields = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=10, errors="replace"))
    except ValueError:
        raise BodyError(400, "the form has too many fields") from None
    feedback = plain(fields.get("feedback", "").replace("\r\n", "\n"))
    return _Form(fields.get("decision", ""), feedback, fields.get("name", ""))


class AnswerPages:
    """The pages of questions."""

    def __init__(self) -> None:
        self._working: set[asyncio.Task[Response]] = set()

    async def respond(self, request: Request) -> Response:
        """Show the question of a link, or take the form. No error leaves this, since its frames have the link."""
        id_, form = request.path_params["id"], None
        if request.method == "POST":
            if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                return _refuse()
            try:
                form = await _read_form(request)
            except BodyError as error:
                return _message(error.status, "Nothing was sent", f"The request cannot be used: {error}.")
        work = asyncio.create_task(self._respond(id_, form))  # sent on, also if the person closes the page
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        if not (await asyncio.wait({work}, timeout=ANSWER_WITHIN))[0]:
            return _uncertain(form)
        try:
            return work.result()
        except Exception as error:  # noqa: BLE001  the server would log the error with its frames
            reason = str(error) if isinstance(error, CrewError) else type(error).__name__
            logger.warning("An answer link could not show its question, and asked to be opened again: %s", reason)
            why = (
                "Nothing was sent. Open the link again in a minute. If that fails too, tell the channel where you got "
                "it: the log of the receiver has the reason."
            )
            return _message(503, "The question cannot be read", why, form)

    async def _respond(self, id_: str, form: _Form | None) -> Response:
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(READ_WITHIN):
                now, question = await in_store(questions.get_question, id_)
                if question is None or now >= (question.expires_at or now + 1):
                    return _refuse()
                attempt = await in_store(attempts.get, question.attempt_id)
                if attempt is None or attempt.ended_at is not None:
                    return await _closed(id_, form)
                crew = await find_crew(attempt)
                if crew is None:
                    raise CrewError(
                        f"The crew {attempt.crew} of the run is not stored, or has another URL than the run. Store it "
                        "under this name with the run's URL."
                    )
                run = LiveRun(crew, str(attempt.first_id), attempt)
                stack.enter_context(withholding(run.redact_text))
                await stack.enter_async_context(run.session)
                asked = await look(run, await read_status(run), after=crew.wait.next_round_after)
            if asked is None or asked.question.id != id_ or asked.state != "open":
                return await _closed(id_, form)
            request = asked.request(run.kickoff_id)
            if form is None:
                return _page(200, run, request)
            try:
                review = form.review(request)
            except ConfigurationError as error:
                return _page(400, run, request, form, f"{error} Nothing was sent.")
            return await _send(run, request, form, review)


async def _send(run: LiveRun, request: ReviewRequest, form: _Form, review: Review) -> Response:
    try:
        _, answer = await answer_question(run, review, seen=request)
    except NotWaitingError:
        return await _closed(request.id, form)
    except Exception as error:  # noqa: BLE001  any error has to be a page
        logger.warning("An answer by a link to run %s: %s", run.kickoff_id, run.redact(str(error)))
        if isinstance(error, AnswerUncertainError) or not isinstance(error, (CrewError, *PREFECT_ERRORS)):
            return _uncertain(form, run.crew.page_url)
        if kickoff_fate(error) is KickoffFate.REFUSED:
            why = "It cannot be sent from this page. Answer on the crew's page."
            return _message(503, "Your answer was not sent", why, form, run.crew.page_url)
        return _page(503, run, request, form, "Your answer was not sent. Nothing is lost: try again in a minute.")
    verb = "approved" if answer.approve else "rejected"
    logger.info("Run %s: question %d was %s by %s.", run.kickoff_id, answer.round, verb, answer.by)
    choice = f"“{plain(run.redact(answer.option))[:SHOWN_NAME]}”" if answer.option else verb.capitalize()
    return _message(200, "Your answer was sent", f"{choice} by {answer.by}. You can close this page.")


async def _closed(id_: str, form: _Form | None) -> Response:
    """Return the page about a question that is not open any more, with the reason."""
    now, question = await in_store(questions.get_question, id_)
    if question is None or question.answer is None:
        return _message(
            409, "The question is closed", "The crew does not wait for this answer any more. Nothing was sent.", form
        )
    (answer,) = reviews_of([question], now)
    verb = "approved" if answer.approve else "rejected"
    unsure = "" if answer.outcome == "sent" else " Nobody knows yet whether that answer arrived."
    why = f"It was {verb} by {describe_answer(answer)}.{unsure} Nothing else was sent."
    return _message(409, "The question has its answer", plain(why), form)


def _refuse() -> Response:
    why = "It is incomplete, or its time is over. Ask the channel where you got the link."
    return _message(404, "This link does not answer a question", why)


def _uncertain(form: _Form | None, page_url: str | None = None) -> Response:
    why = "Nobody knows whether it arrived. Do not answer here again: look at the crew's page."
    return _message(502, "Your answer may have arrived", why, form, page_url)


def _page(status: int, run: LiveRun, question: ReviewRequest, form: _Form | None = None, notice: str = "") -> Response:
    """Return the page of an open question, with a notice and the texts of a form that was not sent. Every text of the
    crew is masked and cut."""
    is_full = run.show == "full"
    message, output = (run.redact(text or "") if is_full else "" for text in (question.message, question.output))
    options = [plain(run.redact(option))[:SHOWN_NAME] for option in question.options]
    if len({*options}) < len(options):
        why = "Its answers look alike here. Answer on the crew's page."
        return _message(status, "A crew asks", why, form, run.crew.page_url)
    return _response(
        status,
        title="A crew asks",
        notice=notice,
        crew=run.crew.label,
        task="" if run.show == "none" else plain(run.redact_name(question.task_id))[:SHOWN_NAME],
        number=question.round,
        message=plain(message[:SHOWN]),
        output=plain(output[:SHOWN]),
        is_cut=max(len(output), len(message)) > SHOWN,
        withheld="It is not known here." if question.output is None else "It is not shown here.",
        page_url=run.crew.page_url,
        options=options,
        read_by_a_model=READ_BY_A_MODEL,
        form=form or _Form(),
        max_feedback=MAX_FEEDBACK,
        max_name=MAX_NAME,
    )


def _message(status: int, heading: str, text: str, form: _Form | None = None, page_url: str | None = None) -> Response:
    """Return a page without a form, with a link to the crew's page. It repeats the feedback of `form` to be copied."""
    kept = "" if form is None else form.feedback
    return _response(status, title="A crew asks", heading=heading, text=text, kept=kept, page_url=page_url)


def _response(status: int, **values: Any) -> Response:
    return HTMLResponse(_PAGE.render(style=_STYLE, **values), status, headers=_HEADERS)
