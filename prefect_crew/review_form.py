"""Asking a person in Prefect's own input form, on the page of the flow run.

A flow run shows one form at a time: it is paused, and its page's Resume button opens the form (read in Prefect 3.9.1's
source, and seen in both of its interfaces). So questions of one flow run stand in line, while its other runs go on.
Prefect's `pause_flow_run` is not used: two at once raise, and nothing but the form could end it. Here the answer may
come from elsewhere as well; then the form is taken back.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.input import RunInput, keyset_from_base_key
from prefect.states import Paused, Running
from prefect.utilities.urls import url_for
from pydantic import Field, ValidationError

from prefect_crew.api.errors import ConfigurationError, CrewAPIError
from prefect_crew.logs import run_logger
from prefect_crew.questions import Question, Questions
from prefect_crew.records import ReviewStore, utcnow
from prefect_crew.rendering import reading
from prefect_crew.reviews import AnsweredError, Review, asked_of, send_review
from prefect_crew.stopping import flow_run_id
from prefect_crew.waiting import WaitPolicy

if TYPE_CHECKING:
    from prefect_crew.open_runs import OpenRun
    from prefect_crew.sessions import CrewSession

__all__ = ["FormReviewer", "ReviewForm"]

LOOK_EVERY = 2.0
"""Seconds between two looks at whether the form was filled in."""
SHOWN = 20_000
"""Characters of an output that the form shows."""
SENT_WITHIN = 20.0
"""Seconds that the end of a wait has for an answer under way; Prefect kills a cancelled process after about 30."""
MARGIN = timedelta(days=1)
"""How long a flow run stays paused after people's time is over, should its process have died meanwhile."""


class ReviewForm(RunInput):
    """What the form asks for."""

    decision: Literal["approve", "reject"] = Field(
        title="Decision", description="Approve: the crew goes on. Reject: the task is done again with the feedback."
    )
    feedback: str = Field(default="", title="Feedback", description="For the crew, in your words.")
    name: str = Field(default="", title="Your name", description="For the record of who answered.")


class _Line:
    """Who may show a form: the first in line, for each flow run, in whichever thread it waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[str, list[object]] = defaultdict(list)

    def enter(self, flow_run_id: str, who: object) -> None:
        with self._lock:
            self._waiting[flow_run_id].append(who)

    def is_first(self, flow_run_id: str, who: object) -> bool:
        with self._lock:
            return self._waiting[flow_run_id][:1] == [who]

    def leave(self, flow_run_id: str, who: object) -> None:
        with self._lock:
            waiting = self._waiting[flow_run_id]
            if who in waiting:
                waiting.remove(who)
            if not waiting:
                del self._waiting[flow_run_id]


_line = _Line()


class _Form:
    """One question's form on the page of a flow run."""

    def __init__(self, own: str, question: Question, model: type[ReviewForm], policy: WaitPolicy) -> None:
        self.own = UUID(own)
        self.question = question
        facts = (question.kickoff_id, question.task_id, question.round)
        digest = hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        # The same in every process and attempt, so that an answer is found by whoever comes after a crash.
        self._base = f"crew-review-{digest}"
        self._keyset = keyset_from_base_key(self._base)
        self._key = self._base
        self._model = model
        self._until = None if policy.human_timeout is None else timedelta(seconds=policy.human_timeout) + MARGIN

    async def answer(self) -> ReviewForm | None:
        """Return what was filled in, None if nothing was."""
        async with get_client() as client:
            return await self._answer(client)

    async def _answer(self, client: PrefectClient) -> ReviewForm | None:
        from prefect.input.actions import aread_flow_run_input

        value = await aread_flow_run_input(self._keyset["response"], flow_run_id=self.own)
        try:
            return None if value is None else ReviewForm.model_validate(value)
        except ValidationError as error:
            run_logger().warning("What was filled into the form about run %s cannot be used: %s", self.question, error)
            return None

    async def put_up(self) -> bool:
        """Pause the flow run with the form; False if it cannot be paused now, since another form is up."""
        self._key = f"{self._base}-{uuid4().hex[:8]}"  # Prefect pauses once for each key
        expires = None if self._until is None else utcnow() + self._until
        state: State[Any] = Paused(pause_expiration_time=expires, reschedule=False, pause_key=self._key)
        state.message = f"Waits for a person: run {self.question.kickoff_id}, task {self.question.task_id}."
        state.state_details.run_input_keyset = cast("dict[str, str]", self._keyset)
        async with get_client() as client:
            answer = await client.set_flow_run_state(self.own, state)
            if answer.status is not SetStateStatus.ACCEPT:
                return False
            await self._model.asave(self._keyset, flow_run_id=self.own)
        return True

    async def is_up(self) -> bool:
        """Return whether the flow run is paused with this form."""
        async with get_client() as client:
            return await self._is_up(client)

    async def _is_up(self, client: PrefectClient) -> bool:
        try:
            state = (await client.read_flow_run(self.own)).state
        except ObjectNotFound:
            return False
        return state is not None and state.is_paused() and state.state_details.pause_key == self._key

    async def take_down(self) -> None:
        """Let the flow run be Running again if it is paused with this form, and forget what was filled in."""
        async with get_client() as client:
            if await self._is_up(client):
                await client.set_flow_run_state(self.own, Running())
            for key in self._keyset.values():
                try:
                    await client.delete_flow_run_input(self.own, key)
                except ObjectNotFound:
                    continue


class FormReviewer:
    """Asks a person in the form of the flow run that waits, one question at a time.

    Raises:
        ConfigurationError: There is no flow run, and so no page to ask on.
    """

    def __init__(
        self, run: OpenRun, session: CrewSession, records: ReviewStore, questions: Questions, policy: WaitPolicy
    ) -> None:
        own = flow_run_id()
        if own is None:
            raise ConfigurationError(
                f"The question of run {run.kickoff_id} cannot be asked in a form: nothing here is a flow run, on whose "
                "page it would stand. Call run_crew, or wait_for_crew in a flow."
            )
        self.run = run
        self.session = session
        self.records = records
        self.questions = questions
        self.policy = policy
        self.own = own
        self._asking: asyncio.Task[None] | None = None
        self._asked: Question | None = None
        self._sending = False

    @property
    def page(self) -> str | None:
        """Where the form is."""
        return url_for("flow-run", obj_id=self.own) or f"flow run {self.own}"

    async def saw(self, question: Question | None) -> None:
        """Put the form up, take it back where it was answered elsewhere, and raise what its answering came to."""
        if self._asked is not question:
            await self._withdraw()
        if question is None:
            return
        if self._asking is None:
            self._asked = question
            self._asking = asyncio.create_task(self._ask(question), name=f"form for {question.kickoff_id}")
        elif self._asking.done():
            asking, self._asking, self._asked = self._asking, None, None
            asking.result()

    @property
    def answering(self) -> asyncio.Task[None] | None:
        """What waits for the form to be filled in, and sends the answer."""
        return self._asking

    async def settle(self) -> None:
        """Wait until an answer that is being sent is on record as sent: it may be what the crew has moved on by."""
        if self._sending and self._asking is not None:
            await asyncio.wait({self._asking}, timeout=SENT_WITHIN)

    async def aclose(self) -> None:
        """Take the form back."""
        await self._withdraw()

    async def _withdraw(self) -> None:
        asking, self._asking, self._asked = self._asking, None, None
        if asking is None:
            return
        if self._sending:
            await asyncio.wait({asking}, timeout=SENT_WITHIN)
        if asking.done():
            if not asking.cancelled() and (error := asking.exception()) is not None:
                run_logger().warning("The form's answer to run %s came to nothing: %s", self.run.kickoff_id, error)
            return
        asking.cancel()
        await asyncio.wait({asking})

    async def _ask(self, question: Question) -> None:
        form = _Form(self.own, question, self._model(question), self.policy)
        _line.enter(self.own, form)
        try:
            filled = await self._filled(form)
        finally:
            _line.leave(self.own, form)
            await self._take_down(form)
        self._sending = True
        try:
            await self._send(question, filled)
        finally:
            self._sending = False

    async def _filled(self, form: _Form) -> ReviewForm:
        """Return what a person fills in. A Prefect API that is away is asked again."""
        up = False
        while True:
            try:
                if not (up and await form.is_up()):
                    # Also what was filled in during an earlier attempt, whose process has died.
                    filled = await form.answer()
                    if filled is not None:
                        return filled
                    up = _line.is_first(self.own, form) and await form.put_up()
            except (httpx.HTTPError, PrefectException) as error:
                run_logger().debug("The form for run %s: %s", self.run.kickoff_id, error)
            await asyncio.sleep(LOOK_EVERY)

    async def _send(self, question: Question, filled: ReviewForm) -> None:
        review = Review(approve=filled.decision == "approve", feedback=filled.feedback)
        status = await self.session.asked(lambda client: client.status(self.run.kickoff_id))
        if asked_of(status) != question.asked:
            self._too_late(filled, "the crew has gone on meanwhile")
            return
        try:
            await send_review(
                self.run,
                self.session,
                self.records,
                task_id=question.task_id,
                review=review,
                by=filled.name.strip() or "the form",
                round=question.round,
                asked=question.asked,
            )
        except AnsweredError as error:
            self._too_late(filled, str(error))
            return
        except CrewAPIError as error:
            if error.status_code not in (400, 404, 409):
                raise
            self._too_late(filled, str(error))
            return
        self.questions.answered(question)
        run_logger().info(
            "Crew run %s: task %s, round %d: %s by %s in the form.",
            self.run.kickoff_id,
            question.task_id,
            question.round,
            "approved" if review.approve else "rejected",
            filled.name.strip() or "somebody",
        )

    def _too_late(self, filled: ReviewForm, why: str) -> None:
        self.questions.forget()
        run_logger().warning(
            "Crew run %s: the form's answer (%s) was not sent, since the question had its answer already: %s",
            self.run.kickoff_id,
            filled.decision,
            self.run.redact(why),
        )

    async def _take_down(self, form: _Form) -> None:
        try:
            await form.take_down()
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("The form for run %s could not be taken back: %s", self.run.kickoff_id, error)

    def _model(self, question: Question) -> type[ReviewForm]:
        run = self.run
        if question.output is None:
            text = "_The status call does not show what is to be judged: look at the crew's page._"
        elif run.show != "full":
            text = f"_{len(question.output):,} characters, which are not shown here: look at the crew's page._"
        else:
            output = run.redact(question.output)
            cut = "\n\n_Cut here; the whole text is on the crew's page._" if len(output) > SHOWN else ""
            text = f"{reading(output[:SHOWN])}{cut}"
        head = f"**{run.crew.label}** asks about task **{question.task_id}**, round {question.round}."
        return ReviewForm.with_initial_data(description=f"{head}\n\n---\n\n{text}")
