"""Asking a person in a form: when it is put up, when it is taken back, and an answer that is sent once.

Questions of one flow run stand in line, while its other runs go on. The answer may come from elsewhere as well; then
the form is taken back.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException
from prefect.utilities.urls import url_for

from prefect_crew.api.errors import ConfigurationError, CrewAPIError
from prefect_crew.interrupts import cancel_and_wait
from prefect_crew.logs import run_logger
from prefect_crew.records import ReviewStore
from prefect_crew.rendering import prose, reading
from prefect_crew.reviewing.forms import Form, ReviewForm, unread
from prefect_crew.reviewing.questions import Questions, where_to_look
from prefect_crew.reviews import AnsweredError, Question, Review, answer_question
from prefect_crew.stopping import flow_run_id
from prefect_crew.waiting import WaitPolicy

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.open_runs import OpenRun

__all__ = ["FormReviewer"]

LOOK_EVERY = 2.0
"""Seconds between two looks at whether the form was filled in."""
SHOWN = 20_000
"""Characters of an output that the form shows."""
SENT_WITHIN = 20.0
"""Seconds that the end of a wait has for an answer under way; Prefect kills a cancelled process after about 30."""


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


class FormReviewer:
    """Asks a person in the form of the flow run that waits, one question at a time.

    Raises:
        ConfigurationError: There is no flow run, and so no page to ask on.
    """

    def __init__(
        self,
        run: OpenRun,
        session: CrewSession,
        records: ReviewStore,
        questions: Questions,
        policy: WaitPolicy,
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
        self._form: Form | None = None
        self._sending = False

    @property
    def page(self) -> str | None:
        """Where the form is."""
        return url_for("flow-run", obj_id=self.own) or f"flow run {self.own}"

    async def saw(self, question: Question | None) -> None:
        """Put the form up, take it back where it was answered elsewhere, and raise what its answering came to."""
        if self._form is not None and self._form.question is not question:
            await self._withdraw()
        if question is None:
            return
        if self._asking is None:
            form = self._form = Form(self.own, question, self._model(question), self.policy)
            self._asking = asyncio.create_task(self._ask(form), name=f"form for {question.kickoff_id}")
        elif self._asking.done():
            asking, self._asking, self._form = self._asking, None, None
            asking.result()

    @property
    def answering(self) -> asyncio.Task[None] | None:
        """What waits for the form to be filled in, and sends the answer."""
        return self._asking

    async def settle(self) -> None:
        """Wait until an answer that is being sent is on record as sent: it may be what the crew has moved on by."""
        if self._sending and self._asking is not None:
            await asyncio.wait({self._asking}, timeout=SENT_WITHIN)

    async def last_call(self) -> bool:
        """Have an answer sent that was given in time, though nobody has read it yet; True if there was one."""
        form, asking = self._form, self._asking
        if form is None or asking is None:
            return False
        try:
            if not await form.answered():
                return False
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("Whether run %s has an answer could not be read: %s", self.run.kickoff_id, error)
            return False
        await asyncio.wait({asking}, timeout=SENT_WITHIN)
        return form.sent

    async def aclose(self, *, ended: bool) -> None:
        """Take the form back. Where the run has ended, what was filled in too late is of no use any more."""
        await self._withdraw()
        if not ended:
            return
        try:
            for decision in await unread(self.own, self.run.kickoff_id):
                run_logger().warning(
                    "Crew run %s: an answer in the form (%s) was not needed, since its question had one already.",
                    self.run.kickoff_id,
                    decision,
                )
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("What is left of forms about run %s stays: %s", self.run.kickoff_id, error)

    async def _withdraw(self) -> None:
        asking, self._asking, self._form = self._asking, None, None
        if asking is None:
            return
        if self._sending:
            await asyncio.wait({asking}, timeout=SENT_WITHIN)
        if asking.done():
            if not asking.cancelled() and (error := asking.exception()) is not None:
                run_logger().warning("The form's answer to run %s came to nothing: %s", self.run.kickoff_id, error)
            return
        await cancel_and_wait(asking)

    async def _ask(self, form: Form) -> None:
        _line.enter(self.own, form)
        try:
            filled = await self._filled(form)
        finally:
            _line.leave(self.own, form)
            await self._take_down(form)
        self._sending = True
        try:
            await self._send(form.question, filled)
            form.sent = True
            # Not before: should this process end here, the next one finds what was filled in.
            await self._forget(form)
        finally:
            self._sending = False

    async def _filled(self, form: Form) -> ReviewForm:
        """Return what a person fills in. A Prefect API that is away is asked again."""
        up = False
        while True:
            try:
                if not (up and await form.is_up()):
                    # Also what was filled in while no process was there.
                    filled = await form.answer()
                    if filled is not None:
                        return filled
                    up = _line.is_first(self.own, form) and await form.put_up()
            except (httpx.HTTPError, PrefectException) as error:
                run_logger().debug("The form for run %s: %r", self.run.kickoff_id, error)
            await asyncio.sleep(LOOK_EVERY)

    async def _send(self, question: Question, filled: ReviewForm) -> None:
        options = () if question.request is None else question.request.options
        decision = str(filled.decision)
        option = decision if decision in options else None
        review = Review(approve=decision in ("approve", *options[:1]), feedback=filled.feedback, option=option)
        try:
            _, sent = await answer_question(
                self.run,
                self.session,
                self.records,
                review,
                by=filled.name.strip() or "the form",
                seen=question,
                told=self.questions.told,
                next_round_after=self.policy.next_round_after,
            )
        except AnsweredError as error:
            self._too_late(filled.decision, str(error))
            return
        except CrewAPIError as error:
            if error.status_code not in (400, 404, 409):
                raise
            self._too_late(filled.decision, str(error))
            return
        self.questions.answered(sent)
        run_logger().info(
            "Crew run %s: task %s, round %d: %s by %s in the form.",
            self.run.kickoff_id,
            question.task,
            question.round,
            "approved" if review.approve else "rejected",
            filled.name.strip() or "somebody",
        )

    def _too_late(self, decision: str, why: str) -> None:
        self.questions.forget()
        run_logger().warning(
            "Crew run %s: the form's answer (%s) was not sent, since the question had its answer already: %s",
            self.run.kickoff_id,
            decision,
            self.run.redact(why),
        )

    async def _take_down(self, form: Form) -> None:
        try:
            await form.take_down()
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("The form for run %s could not be taken back: %s", self.run.kickoff_id, error)

    async def _forget(self, form: Form) -> None:
        try:
            await form.forget()
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("What was filled in about run %s stays: %s", self.run.kickoff_id, error)

    def _model(self, question: Question) -> type[ReviewForm]:
        run = self.run
        if question.output is None:
            text = f"_What is to be judged is not known here. {where_to_look(run)}_"
            if question.so_far is not None and run.show == "full":
                text += f"\n\nOther tasks gave:\n\n{reading(run.redact(question.so_far)[:SHOWN])}"
        elif run.show != "full":
            text = f"_{len(question.output):,} characters, which are not shown here. {where_to_look(run)}_"
        else:
            output = run.redact(question.output)
            cut = "\n\n_Cut here; the whole text is on the crew's page._" if len(output) > SHOWN else ""
            text = f"{reading(output[:SHOWN])}{cut}"
        head = f"**{prose(run.crew.label)}** asks about task **{prose(question.task)}**, round {question.round}."
        return ReviewForm.about(question, f"{head}\n\n---\n\n{text}")
