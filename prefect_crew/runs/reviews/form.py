"""The form on a flow run's page that asks a person, and its answer."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectException, PrefectHTTPStatusError
from prefect.input import RunInput, keyset_from_base_key
from prefect.input.actions import aread_flow_run_input
from prefect.states import Paused, Running
from prefect.utilities.urls import url_for
from pydantic import Field, ValidationError, create_model

from prefect_crew._internal.interrupts import cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.artifacts.markdown import prose, reading
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import AnsweredError, ConfigurationError, CrewAPIError
from prefect_crew.records.model import ReviewStore, utcnow
from prefect_crew.runs.reviews.answer import Question, Review, answer_question
from prefect_crew.runs.reviews.questions import Questions, where_to_look

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.runs.run import OpenRun


MARGIN = timedelta(days=1)
"""How long a flow run stays paused after people's time is over, should its process have died meanwhile."""
_SHOWN = ("schema", "description")
"""What Prefect's page reads of a form. The third part is the answer."""


class ReviewForm(RunInput):
    """What the form asks for."""

    decision: Literal["approve", "reject"] = Field(
        title="Decision", description="Approve: the crew goes on. Reject: the task is done again with the feedback."
    )
    feedback: str = Field(default="", title="Feedback", description="For the crew, in your words.")
    name: str = Field(default="", title="Your name", description="For the record of who answered.")
    question: str = Field(default="", title="Question", description="What this form is about: leave it as it is.")

    @classmethod
    def about(cls, question: Question, text: str) -> type[ReviewForm]:
        """Return the form of one question, with the text that stands above its fields.

        Prefect takes what is submitted for the form that is up at that moment, also from a page that still shows the
        one before. So each form names its question, and Prefect's server refuses the name of another.
        """
        named = f"{question.task}, round {question.round}, run {question.kickoff_id}"
        its = cls.model_fields["question"]
        only = Field(default=named, title=its.title, description=its.description, json_schema_extra={"enum": [named]})
        fields: dict[str, Any] = {"question": (str, only)}
        if question.request is not None and question.request.options:
            # A Flow goes on with one of these, and with nothing else.
            options: list[Any] = list(question.request.options)
            outcome = Field(
                title="Decision", description="What the Flow goes on with.", json_schema_extra={"enum": options}
            )
            fields["decision"] = (str, outcome)
        return create_model(cls.__name__, __base__=cls, **fields).with_initial_data(description=text)


def _digest(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()


def _of_run(kickoff_id: str) -> str:
    """Return what the names of all forms about a run begin with."""
    return f"crew-review-{_digest(kickoff_id)[:8]}-"


class Form:
    """One question's form. `sent`: an answer was sent, and the form is of no use any more."""

    def __init__(self, own: str, question: Question, model: type[ReviewForm], policy: WaitPolicy) -> None:
        self.own = UUID(own)
        self.question = question
        self.sent = False
        # The same in every process and attempt, so that an answer is found by whoever comes after.
        self._base = _of_run(question.kickoff_id) + _digest(question.task_id, question.round)[:16]
        self._keyset = keyset_from_base_key(self._base)
        self._model = model
        self._until = None if policy.human_timeout is None else timedelta(seconds=policy.human_timeout) + MARGIN

    async def answer(self) -> ReviewForm | None:
        """Return what was filled in, None if nothing was, or nothing that can be used."""
        value = await aread_flow_run_input(self._keyset["response"], flow_run_id=self.own)
        try:
            return None if value is None else self._model.model_validate(value)
        except ValidationError as error:
            run_logger().warning("A form about run %s cannot be used: %s", self.question.kickoff_id, error)
            await self.forget()
            return None

    async def answered(self) -> bool:
        """Return whether nothing is to be asked any more."""
        return self.sent or await self.answer() is not None

    async def put_up(self) -> bool:
        """Pause the flow run with the form; False if it cannot be paused now, since another form is up."""
        expires = None if self._until is None else utcnow() + self._until
        async with get_client() as client:
            if not await self._is_up(client):
                key = f"{self._base}-{uuid4().hex[:8]}"  # Prefect pauses once for each key
                state: State[Any] = Paused(pause_expiration_time=expires, reschedule=False, pause_key=key)
                if await self._set(client, state) is None:
                    return False
            await self._store(client)
        return True

    async def _set(self, client: PrefectClient, state: State[Any]) -> State[Any] | None:
        state.message = f"Waits for a person: run {self.question.kickoff_id}, task {self.question.task}."
        state.state_details.run_input_keyset = cast("dict[str, str]", self._keyset)
        answer = await client.set_flow_run_state(self.own, state)
        return (answer.state or state) if answer.status is SetStateStatus.ACCEPT else None

    async def _store(self, client: PrefectClient) -> None:
        # After the state: as it is set, newer Prefects delete what an earlier one has left; older ones do not.
        await _delete(client, self.own, (self._keyset[part] for part in _SHOWN))
        await self._model.asave(self._keyset, flow_run_id=self.own)

    async def is_up(self) -> bool:
        """Return whether the flow run is paused with this form."""
        async with get_client() as client:
            return await self._is_up(client)

    async def _is_up(self, client: PrefectClient) -> bool:
        try:
            state = (await client.read_flow_run(self.own)).state
        except ObjectNotFound:
            return False
        # Whoever has put it up: an earlier try whose answer was lost, or a process that died.
        key = None if state is None or not state.is_paused() else state.state_details.pause_key
        return key is not None and key.startswith(self._base)

    async def take_down(self) -> None:
        """Let the flow run be Running again if it is paused with this form; what was filled in stays."""
        async with get_client() as client:
            if await self._is_up(client):
                await client.set_flow_run_state(self.own, Running())
            await _delete(client, self.own, (self._keyset[part] for part in _SHOWN))

    async def forget(self) -> None:
        """Forget what was filled in."""
        async with get_client() as client:
            await _delete(client, self.own, [self._keyset["response"]])


async def _delete(client: PrefectClient, flow_run_id: UUID, keys: Iterable[str]) -> None:
    for key in keys:
        try:
            await client.delete_flow_run_input(flow_run_id, key)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise


async def unread(own: str, kickoff_id: str) -> list[str]:
    """Take away what is left of all forms about a run, and return the decisions that nobody has read."""
    async with get_client() as client:
        left = await client.filter_flow_run_input(
            flow_run_id=UUID(own), key_prefix=_of_run(kickoff_id), limit=200, exclude_keys=set()
        )
        await _delete(client, UUID(own), (one.key for one in left))
    return [str(one.decoded_value.get("decision")) for one in left if one.key.endswith("-response")]


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

    async def resolve(self) -> None:
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
