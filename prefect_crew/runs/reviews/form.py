"""The form on a flow run's page that asks a person, and its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
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

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.artifacts.markdown import prose, reading
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import AnsweredError, ConfigurationError, CrewAPIError, CrewError
from prefect_crew.records.model import ReviewStore, utcnow
from prefect_crew.runs.reviews.answer import answer_question
from prefect_crew.runs.reviews.questions import Question, Review, digest, where_to_look
from prefect_crew.runs.reviews.tracker import QuestionTracker

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.runs.run import OpenRun

MARGIN = timedelta(days=1)
"""How long a flow run stays paused after people's time is over, should its process have died."""
LOOK_EVERY = 2.0
"""Seconds between two looks at whether the form was filled in."""
SHOWN = 20_000
"""Characters of an output that the form shows."""
PREFECT_WITHIN = 10.0
"""Seconds for one look at the form: a Prefect API that is away must not keep a wait from looking at its run."""
Part = Literal["schema", "description", "response"]
_SHOWN: tuple[Part, ...] = ("schema", "description")
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
        name = f"{question.task}, round {question.round}, run {question.kickoff_id}"
        own = cls.model_fields["question"]
        only = Field(default=name, title=own.title, description=own.description, json_schema_extra={"enum": [name]})
        fields: dict[str, Any] = {"question": (str, only)}
        if question.request is not None and question.request.options:
            options: list[Any] = list(question.request.options)
            description = "What the Flow goes on with."
            outcome = Field(title="Decision", description=description, json_schema_extra={"enum": options})
            fields["decision"] = (str, outcome)
        return create_model(cls.__name__, __base__=cls, **fields).with_initial_data(description=text)


def _of_run(kickoff_id: str) -> str:
    """Return what the names of all forms about a run begin with."""
    return f"crew-review-{digest(kickoff_id)[:8]}-"


class Form:
    """One question's form on a flow run."""

    def __init__(self, own: str, question: Question, model: type[ReviewForm], policy: WaitPolicy) -> None:
        self.own = UUID(own)
        self.question = question
        self._was_up = False
        # The same in every process and attempt, so that an answer is found by whoever comes after.
        self._base = _of_run(question.kickoff_id) + digest(question.task_id, question.round)
        self._keyset = keyset_from_base_key(self._base)
        self._model = model
        self._until = None if policy.human_timeout is None else timedelta(seconds=policy.human_timeout) + MARGIN

    async def look(self) -> ReviewForm | None:
        """Return what was filled in, also while no process was there. Else put the form up if it is not."""
        if self._was_up and await self.is_up():
            return None
        filled = await self.answer()
        self._was_up = filled is None and await self.put_up()
        return filled

    async def answer(self) -> ReviewForm | None:
        """Return what was filled in, None if nothing was, or nothing that can be used."""
        value = await aread_flow_run_input(self._keyset["response"], flow_run_id=self.own)
        try:
            return None if value is None else self._model.model_validate(value)
        except ValidationError as error:
            run_logger().warning("A form about run %s cannot be used: %s", self.question.kickoff_id, error)
            await self.forget_answer()
            return None

    async def put_up(self) -> bool:
        """Pause the flow run with the form; False if it cannot be paused now, since another form is up."""
        async with get_client() as client:
            up = await self._key_up(client)
            if up is not None and not up.startswith(self._base):
                return False
            if up is None:
                message = f"Waits for a person: run {self.question.kickoff_id}, task {self.question.task}."
                key = f"{self._base}-{uuid4().hex[:8]}"  # Prefect pauses once for each key
                expires = None if self._until is None else utcnow() + self._until
                state: State[Any] = Paused(
                    message=message, pause_expiration_time=expires, reschedule=False, pause_key=key
                )
                state.state_details.run_input_keyset = cast("dict[str, str]", self._keyset)
                answer = await client.set_flow_run_state(self.own, state)
                if answer.status is not SetStateStatus.ACCEPT:
                    return False
            # After the state: as it is set, newer Prefects delete what an earlier one has left; older ones do not.
            await self._delete(client, _SHOWN)
            await self._model.asave(self._keyset, flow_run_id=self.own)
        return True

    async def is_up(self) -> bool:
        """Return whether the flow run is paused with this form, whoever has put it up."""
        async with get_client() as client:
            return (await self._key_up(client) or "").startswith(self._base)

    async def _key_up(self, client: PrefectClient) -> str | None:
        """Return the key of the form with which the flow run is paused, None where it is not."""
        try:
            state = (await client.read_flow_run(self.own)).state
        except ObjectNotFound:
            return None
        return None if state is None or not state.is_paused() else state.state_details.pause_key

    async def take_down(self) -> None:
        """Let the flow run be Running again if it is paused with this form; what was filled in stays."""
        async with get_client() as client:
            if (await self._key_up(client) or "").startswith(self._base):
                await client.set_flow_run_state(self.own, Running())
            await self._delete(client, _SHOWN)

    async def forget_answer(self) -> None:
        """Delete what was filled in."""
        async with get_client() as client:
            await self._delete(client, ["response"])

    async def _delete(
        self, client: PrefectClient, parts: Iterable[Literal["schema", "description", "response"]]
    ) -> None:
        await _delete_inputs(client, self.own, (self._keyset[part] for part in parts))


async def _delete_inputs(client: PrefectClient, flow_run_id: UUID, keys: Iterable[str]) -> None:
    for key in keys:
        try:
            await client.delete_flow_run_input(flow_run_id, key)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise


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
        questions: QuestionTracker,
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
        self._form: Form | None = None
        self._filled: ReviewForm | None = None

    @property
    def page(self) -> str:
        """Where the form is."""
        return url_for("flow-run", obj_id=self.own) or f"flow run {self.own}"

    async def see(self, question: Question | None) -> None:
        """Have the form of this question up and no other, and send what was filled in.

        Raises:
            CrewError: It could not be sent. What was filled in is kept for the next attempt.
        """
        if self._form is not None and self._form.question is not question:
            await self._take_down()
        if question is None:
            return
        if self._form is None:
            self._form = Form(self.own, question, self._model(question), self.policy)
        if await self._look():
            await self._answer()

    async def pause(self, pause: Callable[[float], Awaitable[None]], seconds: float) -> None:
        """Pause between two looks at the run, and end it as soon as the form was filled in."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await pause(min(left, LOOK_EVERY))
            waker = self.questions.waker
            if (waker is not None and waker.woken) or await self._look():
                return

    async def finish_answer(self) -> bool:
        """Send an answer that was given in time, though nobody has read it yet; True if there was one."""
        try:
            return await self._look() and await self._answer()
        except CrewError as error:
            run_logger().warning("The form's answer to run %s came to nothing: %s", self.run.kickoff_id, error)
            return False

    async def aclose(self, *, ended: bool) -> None:
        """Take the form down. Where the run has ended, what was filled in too late is deleted."""
        await self._take_down()
        if not ended:
            return
        try:
            async with get_client() as client:
                left = await client.filter_flow_run_input(
                    flow_run_id=UUID(self.own), key_prefix=_of_run(self.run.kickoff_id), limit=200, exclude_keys=set()
                )
                await _delete_inputs(client, UUID(self.own), (one.key for one in left))
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("What is left of forms about run %s stays: %s", self.run.kickoff_id, error)
            return
        for one in left:
            if one.key.endswith("-response"):
                self._say_unneeded(str(one.decoded_value.get("decision")), "its question had an answer already")

    async def _look(self) -> bool:
        """Return whether the form was filled in."""
        if self._form is not None and self._filled is None:
            try:
                async with asyncio.timeout(PREFECT_WITHIN):
                    self._filled = await self._form.look()
            except (httpx.HTTPError, PrefectException, TimeoutError) as error:
                run_logger().debug("The form for run %s: %r", self.run.kickoff_id, error)
        return self._filled is not None

    async def _take_down(self) -> None:
        form, self._form, self._filled = self._form, None, None
        if form is None:
            return
        try:
            await form.take_down()
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("The form for run %s could not be taken down: %s", self.run.kickoff_id, error)

    async def _answer(self) -> bool:
        """Send what was filled in; False if its question had an answer already."""
        form, filled = self._form, self._filled
        if form is None or filled is None:
            return False
        await self._take_down()
        is_sent = await self._send(form.question, filled)
        try:
            # Not before: should this process end before that, the next one finds what was filled in.
            await form.forget_answer()
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("What was filled in about run %s stays: %s", self.run.kickoff_id, error)
        return is_sent

    async def _send(self, question: Question, filled: ReviewForm) -> bool:
        options = () if question.request is None else question.request.options
        decision, name = str(filled.decision), filled.name.strip()
        option = decision if decision in options else None
        review = Review(approve=decision in ("approve", *options[:1]), feedback=filled.feedback, option=option)
        try:
            _, sent = await answer_question(
                self.run,
                self.session,
                self.records,
                review,
                by=name or "the form",
                question=question,
                has_webhook=self.questions.has_webhook,
                next_round_after=self.policy.next_round_after,
            )
        except (AnsweredError, CrewAPIError) as error:
            if isinstance(error, CrewAPIError) and error.status_code not in (400, 404, 409):
                raise
            self.questions.forget()
            self._say_unneeded(decision, self.run.redact(str(error)))
            return False
        self.questions.note_answer(sent)
        run_logger().info(
            "Crew run %s: task %s, round %d: %s by %s in the form.",
            self.run.kickoff_id,
            question.task,
            question.round,
            "approved" if review.approve else "rejected",
            name or "somebody",
        )
        return True

    def _say_unneeded(self, decision: str, why: str) -> None:
        kickoff_id = self.run.kickoff_id
        run_logger().warning("Crew run %s: the form's answer (%s) was not sent: %s", kickoff_id, decision, why)

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
