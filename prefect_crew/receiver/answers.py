"""The pages with which people answer the questions of crews, by a signed link and without access to Prefect.

    GET  /answer/{token}    the question, what is judged, a form; it changes nothing, since chat programs fetch links
    POST /answer/{token}    sends the answer, once

    200 the question, or: sent          404 forged, expired, sent by another site, or not about the open question
    400, 408, 413, 415 no whole form
    409 the question changed, was answered or was closed after the person had opened its page
    502 it may have arrived             503 not sent, or nothing can be read: try again

`answer_question` sends the answer, and the answer on record says that the question has one: a click, a form and the
command line at the same time give one answer. The receiver keeps nothing, so several may serve one address.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4
from weakref import WeakValueDictionary

from jinja2 import Environment, StrictUndefined
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from prefect_crew._internal.prefect_api import OneLine
from prefect_crew._text import one_line, plain
from prefect_crew.batches.stored import batches_waiting_for_people
from prefect_crew.blocks import find_crew
from prefect_crew.client._callbacks import approves
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import Review, ReviewRequest
from prefect_crew.client.redaction import withholding
from prefect_crew.exceptions import (
    AlreadyAnsweredError,
    ConfigurationError,
    CrewError,
    NotWaitingError,
    PrefectAwayError,
)
from prefect_crew.receiver.bodies import BodyError, read_body
from prefect_crew.records.model import RecordPhase, RecordStore
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import MAX_NAME, answer_question, current_question
from prefect_crew.runs.reviews.links import AnswerLink, is_about, read_link
from prefect_crew.runs.reviews.questions import describe_answer, digest, place_of
from prefect_crew.runs.reviews.reviewer import NOBODY
from prefect_crew.runs.run import LiveRun, answers_record
from prefect_crew.webhooks import fingerprint, seal, unseal

logger: OneLine = OneLine(logging.getLogger("prefect_crew.receiver"), {})

SHOWN = 20_000  # characters of a crew's text on a page
SHOWN_NAME = 200  # characters of a name or an option on a page
MAX_FEEDBACK = 10_000  # characters
MAX_FORM = 128 * 1024  # bytes
READ_WITHIN = 15.0  # seconds to read a question, from the Prefect API and the crew's server
STORE_WITHIN = 20.0  # seconds to store an answer, while the Prefect API does not answer
KNOWN_WITHIN = 60.0  # seconds until a page about another answer says that nobody knows whether that arrived
ANSWER_WITHIN = 90.0  # seconds until a page says the same about its own answer, which is sent on
AT_ONCE = 20  # questions of one run that are read at the same time
REFUSED_AFTER, MOST_REFUSED = 0.4, 50
"""Seconds until a link is refused, about as long as a look at the records takes, so that the time does not tell a
forged link from a used one; and the most requests that are held up for it. More of them are refused at once."""
NOBODY_NAMED = "an answer link"  # the giver of an answer, if the person gave no name
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

    decision: str
    feedback: str
    name: str
    seen: str

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
        if by == NOBODY:
            raise ConfigurationError("This name stands for rejections without a person. Write another name.")
        return Review(approve=approve, feedback=self.feedback, option=option, by=by)


async def _read_form(request: Request) -> _Form:
    """Return the form in the body of a request. Raises BodyError."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/x-www-form-urlencoded":
        raise BodyError(415, "the body is no form")
    body = (await read_body(request, MAX_FORM)).decode("utf-8", "replace")
    try:
        fields = parse_qs(body, keep_blank_values=True, max_num_fields=10, errors="replace")
    except ValueError:
        raise BodyError(400, "the form has too many fields") from None
    if any(len(values) > 1 for values in fields.values()):
        raise BodyError(400, "the form has a field twice")
    texts = {name: values[0] for name, values in fields.items()}
    feedback = plain(texts.get("feedback", "").replace("\r\n", "\n"))
    return _Form(texts.get("decision", ""), feedback, texts.get("name", ""), texts.get("seen", ""))


@dataclass(frozen=True)
class _Visit:
    """A request with a link of ours. `signer` is the secret that signed it, `problem` why the request is no use."""

    link: AnswerLink
    signer: SecretStr
    form: _Form | None = None
    problem: BodyError | None = None


class AnswerPages:
    """The pages of questions. `secret` signs their links; several secrets are separated by blanks."""

    def __init__(self, secret: SecretStr) -> None:
        self._secret = secret
        self._gates: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._working: set[asyncio.Task[Response | None]] = set()
        self._refused = 0

    async def respond(self, request: Request) -> Response:
        """Show the question of a link, or take the form. No error leaves this, since its frames have the link."""
        began, is_post = time.monotonic(), request.method == "POST"
        opened = read_link(request.path_params["token"], self._secret)
        is_foreign = is_post and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if opened is None or is_foreign:
            return await self._refuse(began)
        try:
            visit = _Visit(*opened, form=await _read_form(request) if is_post else None)
        except BodyError as error:
            visit = _Visit(*opened, problem=error)
        work = asyncio.create_task(self._respond(visit))
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        if not (await asyncio.wait({work}, timeout=ANSWER_WITHIN))[0]:
            return _uncertain(visit.form)
        try:
            return work.result() or await self._refuse(began)
        except BodyError as error:
            return _message(error.status, "Nothing was sent", f"The request cannot be used: {error}.")
        except Exception as error:  # noqa: BLE001  the server would log the error with its frames
            text = "An answer link to run %s could not show its question, and asked to be opened again: %s"
            logger.warning(text, visit.link.kickoff_id, _reason(error))
            why = (
                "Nothing was sent. Open the link again in a minute. If that fails too, tell the channel where you got "
            )
            why += "it: the log of the receiver has the reason."
            return _message(503, "The question cannot be read", why, visit.form)

    async def _refuse(self, began: float) -> Response:
        if self._refused < MOST_REFUSED:
            self._refused += 1
            try:
                await asyncio.sleep(began + REFUSED_AFTER - time.monotonic())
            finally:
                self._refused -= 1
        why = "It is incomplete, its time is over, or the question is closed. Ask the channel where you got the link."
        return _message(404, "This link does not answer a question", why)

    async def _respond(self, visit: _Visit) -> Response | None:
        """Return the page of a link, None to refuse the link."""
        link, form = visit.link, visit.form
        async with AsyncExitStack() as stack:
            gate = self._gates.setdefault(link.kickoff_id, asyncio.Semaphore(AT_ONCE))
            async with asyncio.timeout(READ_WITHIN), gate:
                run = await _open_run(link.kickoff_id, stack)
                question = None if run is None else await _open_question(run, visit)
            if run is None or question is None:
                return None if run is None else await self._closed(run, visit)
            if visit.problem is not None:
                raise visit.problem
            page, shown = self._page(run, question, link)
            if form is None:
                return page.response(200)
            if not self._has_seen(link, form, shown):
                again = "The question has changed since you read it. Nothing was sent. Read it again, then answer."
                return page.response(409, replace(form, decision=""), notice=again)
            try:
                review = form.review(question)
            except ConfigurationError as error:
                return page.response(400, form, notice=f"{error} Nothing was sent.")
            return await self._send(page, visit, form, review)

    def _page(self, run: LiveRun, question: ReviewRequest, link: AnswerLink) -> tuple[_Question, str]:
        shown = digest(place_of(question), question.output, question.message, question.options)
        seen = seal("seen", [link.place, fingerprint(self._secret, shown)], self._secret)
        return _Question(run, question, seen), shown

    def _has_seen(self, link: AnswerLink, form: _Form, shown: str | None = None) -> bool:
        """Return whether a form is of this link; with `shown`, whether its page showed that."""
        unsealed = unseal("seen", form.seen, self._secret)
        if unsealed is None or unsealed[0][0] != link.place:
            return False
        (_, seen), signer = unsealed
        return shown is None or seen == fingerprint(signer, shown)

    async def _closed(self, run: LiveRun, visit: _Visit) -> Response | None:
        """Return the page about a question that is not open any more, with the reason; None for a person who has not
        seen the question open.
        """
        link, form = visit.link, visit.form
        if form is None or not self._has_seen(link, form):
            return None
        until = time.monotonic() + KNOWN_WITHIN
        while answer := next(iter((await run.records.reviews(answers_record(run)))[link.number - 1 :]), None):
            if answer.outcome != "intended" or time.monotonic() > until:
                verb = "approved" if answer.approve else "rejected"
                unsure = "" if answer.outcome == "sent" else " Nobody knows yet whether that answer arrived."
                why = f"It was {verb} by {describe_answer(answer)}.{unsure} Nothing else was sent."
                return _message(409, "The question has its answer", plain(why), form)
            await asyncio.sleep(1)
        if question := await _open_question(run, visit):
            again = "The crew did not take the answer before yours. Yours was not sent: choose again."
            form = replace(form, decision="")
            return self._page(run, question, link)[0].response(409, form, notice=again)
        why = "The crew does not wait for this answer any more. Nothing was sent."
        return _message(409, "The question is closed", why, form)

    async def _send(self, page: _Question, visit: _Visit, form: _Form, review: Review) -> Response | None:
        run, nonce, until = page.run, uuid4().hex, time.monotonic() + STORE_WITHIN
        try:
            while True:
                try:
                    _, answer = await answer_question(run, review, question=page.question, nonce=nonce)
                    break
                except PrefectAwayError:  # the answer may be on record, and nothing was sent
                    if time.monotonic() > until:
                        raise
                    await asyncio.sleep(1)
        except (AlreadyAnsweredError, NotWaitingError):
            return await self._closed(run, visit)
        except Exception as error:  # noqa: BLE001  any of them may come after the crew has taken the answer
            text = "Run %s: an answer by link may not have been sent: %s. To look: prefect-crew reviews inspect %s"
            logger.warning(text, run.kickoff_id, run.redact(_reason(error)), run.as_argument())
            return await _failed(page, form, error, nonce)
        verb = "approved" if answer.approve else "rejected"
        logger.info("Run %s: question %d was %s by %s.", run.kickoff_id, answer.round, verb, answer.by)
        choice = f"“{plain(run.redact(answer.option))[:SHOWN_NAME]}”" if answer.option else verb.capitalize()
        return _message(200, "Your answer was sent", f"{choice} by {answer.by}. You can close this page.")


async def _failed(page: _Question, form: _Form, error: Exception, nonce: str) -> Response:
    """Return the page about an answer that was not sent, or may have arrived: its record decides."""
    run, is_away = page.run, isinstance(error, PrefectAwayError)
    if not is_away:
        try:
            answers = await run.records.reviews(answers_record(run))
        except Exception:  # noqa: BLE001  not known
            return _uncertain(form, run.crew.page_url)
        if any(answer.nonce == nonce for answer in answers):
            return _uncertain(form, run.crew.page_url)
    if is_away or kickoff_fate(error) is KickoffFate.REFUSED:
        why = "It cannot be sent from this page. Answer on the crew's page."
        if is_away:
            why = "Open the link again in a minute. If it shows no question then, answer on the crew's page."
        return _message(503, "Your answer was not sent", why, form, run.crew.page_url)
    why = "Your answer was not sent. Nothing is lost: try again in a minute."
    return page.response(503, form, notice=why)


def _uncertain(form: _Form | None, page_url: str | None = None) -> Response:
    why = "Nobody knows whether it arrived. Do not answer here again: look at the crew's page."
    return _message(502, "Your answer may have arrived", why, form, page_url)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CrewError) else type(error).__name__


async def _open_run(kickoff_id: str, stack: AsyncExitStack) -> LiveRun | None:
    """Return the run of a kickoff id, connected until `stack` closes.

    Return None if no record has the id, or if the run has ended and its crew is not stored any more.

    Raises:
        CrewError: The crew of a run in flight is not stored any more, or a batch that cannot be opened here may have
            the run.
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
    """
    records: RecordStore = PrefectRecords()
    record = await records.of_kickoff(kickoff_id)
    if record is None:
        batches, missed = await stack.enter_async_context(batches_waiting_for_people())
        for records in [batch.ledger for batch in batches]:
            record = await records.of_kickoff(kickoff_id)
            # A ledger finds the id among the runs of all its batches, also of other batches than this store's.
            if record is not None and await records.attempts(record.idempotency_key):
                break
        else:
            if missed:
                raise CrewError(" ".join(missed))
            return None
    crew = await find_crew(record)
    if crew is None and record.phase is RecordPhase.ENDED:
        return None
    if crew is None:
        raise CrewError(
            f"The crew {record.crew} of the run is not stored, or has another URL than the run. Store it under this "
            "name with the run's URL."
        )
    run = LiveRun(crew, kickoff_id, record, records=records)
    stack.enter_context(withholding(run.redact_text))
    await stack.enter_async_context(run.session)
    return run


async def _open_question(run: LiveRun, visit: _Visit) -> ReviewRequest | None:
    """Return the question of a link, None if the run asks another one, or none."""
    if run.record is not None and run.record.phase is RecordPhase.ENDED:
        return None
    try:
        question = await current_question(run)
    except NotWaitingError:
        return None
    # A link is made for an open question. If its last answer seems to be to this question, it was to an equal one: the
    # wait has seen a sign that the crew asks again, such as a webhook.
    question = question.model_copy(update={"state": "open"})
    return question if is_about(visit.link, question, visit.signer) else None


@dataclass(frozen=True)
class _Question:
    """The page of an open question. `seen` proves what it shows. Every text of the crew is masked and cut."""

    run: LiveRun
    question: ReviewRequest
    seen: str

    def response(self, status: int, form: _Form | None = None, *, notice: str = "") -> Response:
        """Return the page, with a notice and the texts of a form that was not sent."""
        run, question = self.run, self.question
        is_full = run.show == "full"
        message, output = (run.redact(text or "") if is_full else "" for text in (question.message, question.output))
        withheld = ""
        if not output:
            withheld = "It is not known here." if question.output is None else "It is not shown here."
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
            withheld=withheld,
            page_url=run.crew.page_url,
            options=options,
            form=form or _Form("", "", "", ""),
            seen=self.seen,
            max_feedback=MAX_FEEDBACK,
            max_name=MAX_NAME,
        )


def _message(status: int, heading: str, text: str, form: _Form | None = None, page_url: str | None = None) -> Response:
    """Return a page without a form, with a link to the crew's page. It repeats the feedback of `form` to be copied."""
    kept = "" if form is None else form.feedback
    return _response(status, title="A crew asks", heading=heading, text=text, kept=kept, page_url=page_url)


def _response(status: int, **values: Any) -> Response:
    return HTMLResponse(_PAGE.render(style=_STYLE, **values), status, headers=_HEADERS)
