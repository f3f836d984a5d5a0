"""Answering for people from outside of a wait: what waits, over all records in flight, and an answer once a round.

Records live on the Prefect server, and those of a batch's rows in its ledger: each of them is a store here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RecordPhase, ReviewStore, RunRecord, SentReview
from prefect_crew.records.notes import kept_output, kept_requests
from prefect_crew.runs.reviews.answer import (
    LOOKS,
    Review,
    Standing,
    answer_question,
    asked_of,
    judged,
    outputs_so_far,
    round_of,
    standing_of_request,
    waiting_task,
)
from prefect_crew.runs.reviews.questions import where_to_look
from prefect_crew.runs.run import OpenRun
from prefect_crew.states import CrewState

AT_ONCE = 8
"""Status calls at a time."""
CrewOf = Callable[[RunRecord], "Awaitable[Crew | None]"]
"""Gives the crew of a record, None where its block is not stored."""


class AskedStore(ReviewStore, Protocol):
    """What is asked of a place where records live."""

    def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight, or those of them that are known to have waited for a person."""
        ...

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        ...

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the record that holds a kickoff id, if any."""
        ...


@dataclass(frozen=True)
class AskedRun:
    """A run that waits for a person.

    `output` is what is to be judged as it may be shown, None where it may not, or is not known; `withheld` says why.
    `round` counts the task's questions from 1; `since` is UTC, None where nobody has noted it; `given` is what was
    answered before. `seen`: whether the crew's server was asked, else it is as whoever waits for the run has noted.
    """

    record: RunRecord
    task_id: str | None
    round: int
    since: datetime | None
    output: str | None = field(default=None, repr=False)
    withheld: str | None = None
    given: tuple[SentReview, ...] = ()
    seen: bool = True
    options: tuple[str, ...] = ()

    @property
    def kickoff_id(self) -> str:
        """The run's id."""
        return str(self.record.kickoff_id)


async def asked_runs(stores: Sequence[AskedStore], crew_of: CrewOf) -> list[AskedRun]:
    """Return the runs in flight that wait for a person, the longest waiting first.

    Each crew's server is asked, where its block is stored; else what the record has counts.

    Raises:
        httpx.HTTPError: The Prefect API is away.
        LedgerError: The ledger of a batch cannot be read.
    """
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(record: RunRecord, store: AskedStore) -> AskedRun | None:
        async with gate:
            return await look_at_question(record, store, crew_of, requests)

    requests = await requests_by_run()
    found = [one(record, store) for store in stores async for record in store.may_ask()]
    lines = [line for line in await asyncio.gather(*found) if line is not None]
    return sorted(lines, key=lambda line: line.since or line.record.kicked_off_at or line.record.claimed_at)


async def requests_by_run() -> dict[str, FeedbackRequest]:
    """Return what Flows ask at callbacks, by kickoff id.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    return {one.kickoff_id: one for one in await kept_requests()}


def _of_request(
    record: RunRecord, run: OpenRun | None, request: FeedbackRequest, given: Sequence[SentReview]
) -> AskedRun:
    output = None if run is None or run.show != "full" or request.output is None else run.redact(request.output)
    return AskedRun(
        record=record,
        task_id=request.task_id if run is None else run.named(request.task_id),
        round=round_of(given, request.task_id),
        since=record.human_since,
        output=output,
        withheld=None if output is not None else "its crew is not known here, or does not show it.",
        given=tuple(given),
        seen=run is not None,
        options=request.options,
    )


async def look_at_question(
    record: RunRecord, records: ReviewStore, crew_of: CrewOf, requests: Mapping[str, FeedbackRequest]
) -> AskedRun | None:
    """Return what a run in flight asks, None if it asks nothing. `requests` are what Flows ask, by kickoff id."""
    crew = await crew_of(record)
    status: CrewStatus | None = None
    run: OpenRun | None = None
    if crew is not None:
        run = OpenRun(crew=crew, kickoff_id=str(record.kickoff_id), record=record)
        try:
            async with CrewSession(crew, withhold=run.withholding()) as session:
                status = await session.asked(lambda client: client.status(str(record.kickoff_id)))
        except CrewError:
            status = None  # then what is on record has to do
    waits = record.human_since is not None if status is None else status.state is CrewState.WAITING
    ended = status is not None and (status.state.ended or status.state is CrewState.UNKNOWN)
    request = None if ended else requests.get(str(record.kickoff_id))
    if not waits and request is None:
        return None
    given = await records.reviews(record)
    if request is not None and standing_of_request(given, request) is not Standing.ANSWERED:
        return _of_request(record, run, request, given)
    if not waits:
        return None
    task_id = record.human_task if status is None else waiting_task(status)
    output, withheld = await _shown(run, status, len(given))
    return AskedRun(
        record=record,
        task_id=task_id if task_id is None or run is None or status is None else run.named(task_id),
        round=1 if task_id is None else round_of(given, task_id),
        since=record.human_since,
        output=output,
        withheld=withheld,
        given=tuple(given),
        seen=status is not None,
    )


async def _shown(run: OpenRun | None, status: CrewStatus | None, answers: int) -> tuple[str | None, str | None]:
    if run is None or status is None:
        return None, "its crew's server was not asked. Look at the crew's page, or give --crew."
    output = judged(status)
    if asked_of(status) is None and run.record is not None and run.record.hooked:
        output = await kept_output(run.record, answers) or output
    if output is None and run.show == "full" and (so_far := outputs_so_far(status)) is not None:
        # Not what is to be judged, so it is not given as that.
        return None, f"the status does not show it. {where_to_look(run)} Other tasks gave:\n\n{run.redact(so_far)}"
    if output is None:
        return None, f"the status does not show it. {where_to_look(run)}"
    if run.show != "full":
        return None, f"{len(output):,} characters that this crew does not show. {where_to_look(run)}"
    return run.redact(output), None


async def find_asked(given: str, stores: Sequence[AskedStore]) -> tuple[RunRecord, AskedStore]:
    """Return the run in flight that an idempotency key, a kickoff id or the beginning of one names, and where it is on
    record.

    Raises:
        CrewError: There is none, several begin so, or it has ended.
    """
    named = await _named(given, stores)
    if named is None:
        raise CrewError(f"No run in flight is {given!r}. prefect-crew reviews lists those that wait for a person.")
    record = named[0]
    if record.phase is RecordPhase.ENDED:
        raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: it has ended ({record.state}).")
    if record.phase is not RecordPhase.STARTED or record.kickoff_id is None:
        raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: its kickoff is {record.phase}.")
    return named


async def _named(given: str, stores: Sequence[AskedStore]) -> tuple[RunRecord, AskedStore] | None:
    for store in stores:
        if attempts := await store.attempts(given):
            return attempts[-1], store
    for store in stores:
        record = await store.of_kickoff(given)
        # A ledger knows the runs of all batches that are kept in it.
        if record is not None and await store.attempts(record.idempotency_key):
            return record, store
    found = [
        (one, store)
        for store in stores
        async for one in store.may_ask()
        if str(one.kickoff_id).startswith(given) or one.idempotency_key.startswith(given)
    ]
    if len(found) > 1:
        ids = ", ".join(str(one.kickoff_id) for one, _ in found[:5])
        raise CrewError(f"{len(found)} runs in flight begin with {given!r}: {ids}. Give more of it.")
    return found[0] if found else None


async def answer_run(
    record: RunRecord,
    crew: Crew,
    records: ReviewStore,
    review: Review,
    *,
    by: str,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
) -> SentReview:
    """Answer for the person that a run waits for, once a round, and return what is on record of it.

    Args:
        record: The run.
        crew: Its crew.
        records: Where it is on record.
        review: The answer.
        by: Who answers.
        task_id: The task, where the status does not name it.
        round: The round that was looked at. Another one is not answered.

    Raises:
        CrewError: As `answer_question`.
    """
    run = OpenRun(crew=crew, kickoff_id=str(record.kickoff_id), record=record)
    async with CrewSession(crew, withhold=run.withholding()) as session:
        _, sent = await answer_question(
            run,
            session,
            records,
            review,
            by=by,
            task_id=task_id,
            round=round,
            next_round_after=crew.wait.next_round_after,
            looks=LOOKS,
        )
    return sent
