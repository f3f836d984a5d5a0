"""A question's form on the page of a flow run, up while its process waits.

A flow run shows one form at a time: it is paused, and its page's Resume button opens the form (read in the source of
Prefect 3.7.1 and 3.9.1, and seen in both of its interfaces). Prefect's `pause_flow_run` is not used: two at once raise,
and nothing but the form could end it. Nor is its `suspend_flow_run`: it has another place for the answer each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal, cast
from uuid import UUID, uuid4

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.input import RunInput, keyset_from_base_key
from prefect.input.actions import aread_flow_run_input
from prefect.states import Paused, Running
from pydantic import Field, ValidationError, create_model

from prefect_crew.logs import run_logger
from prefect_crew.records import utcnow
from prefect_crew.reviews import Question
from prefect_crew.waiting import WaitPolicy

__all__ = ["Form", "ReviewForm", "unread"]

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
