"""The form on a flow run's page: it shows a question to a person, and Prefect stores the answer with the flow run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast
from uuid import UUID, uuid4

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.input import Keyset, RunInput, keyset_from_base_key
from prefect.input.actions import aread_flow_run_input
from prefect.states import Paused, Running
from prefect.utilities.urls import url_for
from pydantic import Field, ValidationError, create_model, model_validator

from prefect_crew._internal.clock import utcnow
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.escape import prose, reading
from prefect_crew.client._callbacks import READ_BY_A_MODEL, approves
from prefect_crew.client.models import Review, ReviewRequest
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.reviews.questions import digest, masked_request

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun

MARGIN = timedelta(days=1)
"""After people's time is over, a flow run whose process died stays paused for this long."""
LOOK_EVERY = 2.0
"""Seconds between two requests for a submitted form."""
SHOWN = 20_000
"""Characters of an output that the form shows."""
PREFECT_WITHIN = 10.0
"""Seconds for one request about the form: if the Prefect API does not answer, the wait must go on with its polls."""


class ReviewForm(RunInput):
    """The fields of the form."""

    decision: Literal["approve", "reject"] = Field(
        title="Decision", description="Approve: the crew continues. Reject: the task is done again with the feedback."
    )
    feedback: str = Field(
        default="", title="Feedback", description="For the crew, in your words. A rejection without it is asked again."
    )
    name: str = Field(default="", title="Your name", description="For the record of who answered.")
    question: str = Field(default="", title="Question", description="The question of this form: leave it as it is.")
    has_options: ClassVar[bool] = False

    @model_validator(mode="after")
    def _needs_feedback(self) -> Self:
        if self.decision == "reject" and not self.has_options and not self.feedback.strip():
            raise ValueError("a rejection needs feedback for the crew")
        return self

    @classmethod
    def about(
        cls, question: ReviewRequest, text: str, task: str = "", mark: str = "", options: Sequence[str] = ()
    ) -> type[ReviewForm]:
        """Return the form of one question, with the text above its fields.

        A page may still show an earlier form when a person submits it, and Prefect then accepts it as the current form.
        So each form contains the name of its question, and Prefect's server refuses the name of another question.

        Args:
            question, text: The question, and the text.
            task: The masked name of the task.
            mark: A digest that no other question has.
            options: The options of the question, masked by `masked_options`.
        """
        name = f"{task}, question {question.round}, run {question.kickoff_id}, {mark[:8]}"
        own = cls.model_fields["question"]
        only = Field(default=name, title=own.title, description=own.description, json_schema_extra={"enum": [name]})
        fields: dict[str, Any] = {"question": (str, only)}
        if shown := options or question.options:
            choice: Any = Literal[tuple(shown)]
            fields["decision"] = (
                choice,
                Field(title="Decision", description="The outcome that the Flow continues with."),
            )
            fields["feedback"] = (str, Field(default="", title="Feedback", description=READ_BY_A_MODEL))
        form = create_model(cls.__name__, __base__=cls, **fields)
        form.has_options = bool(shown)
        return form.with_initial_data(description=text)

    def review(self, question: ReviewRequest, options: Sequence[str] = ()) -> Review:
        """Return the submitted form as an answer to its question. `options` are those of `about`."""
        decision, by = str(self.decision), self.name.strip() or "the form"
        decision = dict(zip(options, question.options, strict=False)).get(decision, decision)
        if decision not in question.options:
            return Review(approve=decision == "approve", feedback=self.feedback, by=by)
        approve = approves(question.options, decision)
        return Review(approve=approve, feedback=self.feedback, option=decision, by=by)


def masked_options(run: LiveRun, question: ReviewRequest) -> list[str]:
    """Return the options of a Flow's question for its form, with numbers if masking makes two of them equal."""
    options = [run.redact(option) for option in question.options]
    is_clear = len({*options}) == len(options)
    return options if is_clear else [f"{number}: {option}" for number, option in enumerate(options, 1)]


def _of_run(kickoff_id: str) -> str:
    """Return the prefix of the names of all forms about a run."""
    return f"crew-review-{digest(kickoff_id)[:8]}-"


class Form:
    """The form on the page of the flow run that waits, for one question at a time.

    `question` is its question or None; `page` is the address of the page.

    Args:
        own: The flow run.
        run: The run that the flow run waits for.
        policy: The time for people.

    Raises:
        ConfigurationError: There is no flow run, and so no page for the form.
    """

    def __init__(self, own: str | None, run: LiveRun, policy: WaitPolicy) -> None:
        if own is None:
            raise ConfigurationError(
                f"The question of run {run.kickoff_id} cannot be shown as a form, because this is not a flow run. "
                "Call run_crew, or wait_for_crew in a flow."
            )
        self.page = url_for("flow-run", obj_id=own) or f"flow run {own}"
        self.question: ReviewRequest | None = None
        self._own = UUID(own)
        self._run = run
        self._until = None if policy.human_timeout is None else timedelta(seconds=policy.human_timeout) + MARGIN
        self._base = ""
        """The prefix of the keys of all pauses with this question's form."""
        self._model = ReviewForm
        self._options: list[str] = []
        self._filled: ReviewForm | None = None
        self._was_up = self._has_warned = False

    async def show(self, question: ReviewRequest | None) -> None:
        """Set the question of the form; `look` puts the form up."""
        if self.question == question:
            return
        await self.take_down()
        self.question = question
        if question is None:
            return
        # The same in every process and attempt, so that a later process finds the answer; the id itself is secret.
        mark = digest(question.id)
        self._base = _of_run(question.kickoff_id) + mark
        task = self._run.redact_name(question.task_id)
        self._options = masked_options(self._run, question)
        self._model = ReviewForm.about(question, _text(self._run, question), task, mark, self._options)

    async def look(self) -> Review | None:
        """Return the answer of the submitted form, also if no process ran when it was submitted. Else put it up."""
        if self.question is not None and self._filled is None:
            try:
                async with asyncio.timeout(PREFECT_WITHIN), get_client() as client:
                    self._filled = await self._look(client, self.question)
            except (*PREFECT_ERRORS, TimeoutError) as error:
                warn = run_logger().debug if self._was_up or self._has_warned else run_logger().warning
                self._has_warned = True
                warn("The form for run %s is not on its page yet; it is tried again: %r", self._run.kickoff_id, error)
        return (
            None if self.question is None or self._filled is None else self._filled.review(self.question, self._options)
        )

    async def _look(self, client: PrefectClient, question: ReviewRequest) -> ReviewForm | None:
        up = await self._key_up(client)
        is_ours = up is not None and up.startswith(self._base)
        if self._was_up and is_ours:
            return None
        value = await aread_flow_run_input(self._keyset["response"], flow_run_id=self._own)
        try:
            if value is not None:
                return self._model.model_validate(value)
        except ValidationError as error:
            run_logger().warning("A form about run %s cannot be used: %s", question.kickoff_id, error)
            await self._delete(client, self._keyset["response"])
        if up is None:
            task = self._run.redact_name(question.task_id)
            message = f"Waits for a person: run {question.kickoff_id}, task {task}."
            key = f"{self._base}-{uuid4().hex[:8]}"  # Prefect pauses once for each key
            expires = None if self._until is None else utcnow() + self._until
            state: State[Any] = Paused(message=message, pause_expiration_time=expires, reschedule=False, pause_key=key)
            state.state_details.run_input_keyset = cast("dict[str, str]", self._keyset)
            is_ours = (await client.set_flow_run_state(self._own, state)).status is SetStateStatus.ACCEPT
        self._was_up = False
        if is_ours:  # else another form is up
            # After the new state: newer versions of Prefect delete the inputs of an earlier form when they set the
            # state; older ones do not.
            await self._hide(client)
            await self._model.asave(self._keyset, flow_run_id=self._own)
            self._was_up = True
        return None

    @property
    def _keyset(self) -> Keyset:
        return keyset_from_base_key(self._base)

    async def _key_up(self, client: PrefectClient) -> str | None:
        """Return the key of the form that the flow run shows while it is paused, also of another process's form; None
        if the flow run is not paused."""
        try:
            state = (await client.read_flow_run(self._own)).state
        except ObjectNotFound:
            return None
        return None if state is None or not state.is_paused() else state.state_details.pause_key

    async def take_down(self) -> None:
        """Set the flow run to Running if it is paused with this form. A submitted answer stays stored."""
        if self.question is None:
            return
        self.question, self._filled, self._was_up = None, None, False
        try:
            async with get_client() as client:
                if (await self._key_up(client) or "").startswith(self._base):
                    await client.set_flow_run_state(self._own, Running())
                await self._hide(client)
        except PREFECT_ERRORS as error:
            run_logger().warning(
                "The form for run %s stays open. Resume the flow run if it is Paused: %s", self._run.kickoff_id, error
            )

    async def _hide(self, client: PrefectClient) -> None:
        await self._delete(client, self._keyset["schema"], self._keyset["description"])

    async def forget_answer(self) -> None:
        """Delete the submitted answer to the last question."""
        try:
            async with get_client() as client:
                await self._delete(client, self._keyset["response"])
        except PREFECT_ERRORS as error:
            run_logger().debug("The submitted form about run %s stays stored: %s", self._run.kickoff_id, error)

    async def _delete(self, client: PrefectClient, *keys: str) -> None:
        for key in keys:
            try:
                await client.delete_flow_run_input(self._own, key)
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 404:
                    raise

    async def pause(self, pause: Callable[[float], Awaitable[bool]], seconds: float) -> bool:
        """Wait until the next status call. Return True if a webhook or a submitted form has ended the wait early."""
        end = time.monotonic() + seconds
        while (seconds_left := end - time.monotonic()) > 0:
            if await pause(min(seconds_left, LOOK_EVERY)) or await self.look() is not None:
                return True
        return False

    async def aclose(self, *, ended: bool) -> None:
        """Take the form down. If the run has ended, delete the stored inputs of all forms about it."""
        await self.take_down()
        if not ended:
            return
        prefix = _of_run(self._run.kickoff_id)
        try:
            async with get_client() as client:
                inputs = await client.filter_flow_run_input(self._own, prefix, limit=200, exclude_keys=set())
                await self._delete(client, *(item.key for item in inputs))
        except PREFECT_ERRORS as error:
            run_logger().debug("Old forms about run %s could not be removed: %s", self._run.kickoff_id, error)


def _text(run: LiveRun, question: ReviewRequest) -> str:
    """Return the text above the fields of a question's form."""
    masked = masked_request(run, question)
    if masked.output is None:
        text = f"_It is not shown here: {masked.withheld}_"
    else:
        cut = "\n\n_Cut here; the whole text is on the crew's page._" if len(masked.output) > SHOWN else ""
        text = f"{reading(masked.output[:SHOWN])}{cut}"
    task = prose(masked.task_id)
    head = f"**{prose(run.crew.label)}** asks about task **{task}**, question {question.round}."
    message = reading((masked.message or "")[:SHOWN])
    return "\n\n".join(filter(None, (head, message, "---", text)))
