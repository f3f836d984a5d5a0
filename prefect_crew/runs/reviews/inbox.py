"""Answering for people from outside of a wait: what waits, over all records in flight, and an answer once a round.

Records live on the Prefect server, and those of a batch's rows in its ledger: each of them is a store here.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.client.models import CrewStatus, ResumeAnswer
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RecordPhase, ReviewStore, RunRecord, SentReview
from prefect_crew.records.notes import kept_output, kept_requests
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import LOOKS, answer_question
from prefect_crew.runs.reviews.questions import (
    QuestionState,
    Review,
    judged_output,
    next_round,
    outputs_so_far,
    question_digest,
    request_state,
    waiting_task,
    where_to_look,
)
from prefect_crew.runs.run import OpenRun, find_run
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks

ASKS = "prefect-crew-batch-asks"
"""The tag of a batch, on the Prefect server, of which some rows wait for people, or did at the last look."""
AT_ONCE = 8
"""Status calls at a time."""
CrewOf = Callable[[RunRecord], "Awaitable[Crew | None]"]
"""Gives the crew of a record, None where its block is not stored."""


class ReviewableStore(ReviewStore, Protocol):
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
class PendingReview:
    """A run that waits for a person.

    `output` is what is to be judged as it may be shown, None where it may not, or is not known; `withheld` says why.
    `round` counts the task's questions from 1; `since` is UTC, None where nobody has noted it; `answers` are the
    earlier ones. `seen`: whether the crew's server was asked, else it is as whoever waits for the run has noted.
    """

    record: RunRecord
    task_id: str | None
    round: int
    since: datetime | None
    output: str | None = field(default=None, repr=False)
    withheld: str | None = None
    answers: tuple[SentReview, ...] = ()
    seen: bool = True
    options: tuple[str, ...] = ()

    @property
    def kickoff_id(self) -> str:
        """The run's id."""
        return str(self.record.kickoff_id)


async def list_pending_reviews(stores: Sequence[ReviewableStore], crew_of: CrewOf) -> list[PendingReview]:
    """Return the runs in flight that wait for a person, the longest waiting first.

    Each crew's server is asked, where its block is stored; else what the record has counts.

    Raises:
        httpx.HTTPError: The Prefect API is away.
        LedgerError: The ledger of a batch cannot be read.
    """
    gate = asyncio.Semaphore(AT_ONCE)
    requests = await requests_by_run()

    async def look(record: RunRecord, store: ReviewableStore) -> PendingReview | None:
        async with gate:
            return await read_pending_review(record, store, crew_of, requests)

    looks = [look(record, store) for store in stores async for record in store.may_ask()]
    found = [asked for asked in await asyncio.gather(*looks) if asked is not None]
    return sorted(found, key=lambda asked: asked.since or asked.record.kicked_off_at or asked.record.claimed_at)


async def requests_by_run() -> dict[str, FeedbackRequest]:
    """Return what Flows ask at callbacks, by kickoff id.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    return {one.kickoff_id: one for one in await kept_requests()}


async def read_pending_review(
    record: RunRecord, records: ReviewStore, crew_of: CrewOf, requests: Mapping[str, FeedbackRequest]
) -> PendingReview | None:
    """Return what a run in flight asks, None if it asks nothing. `requests` are what Flows ask, by kickoff id."""
    kickoff_id, crew = str(record.kickoff_id), await crew_of(record)
    run = None if crew is None else OpenRun(crew=crew, kickoff_id=kickoff_id, record=record)
    status = None if run is None else await _status(run)
    waits = record.human_since is not None if status is None else status.state is CrewState.WAITING
    is_over = status is not None and (status.state.ended or status.state is CrewState.UNKNOWN)
    request = None if is_over else requests.get(kickoff_id)
    if not waits and request is None:
        return None
    answers = tuple(await records.reviews(record))
    if request is not None and request_state(answers, request) is QuestionState.ANSWERED:
        request = None
    if request is not None:
        task_id, options, seen = request.task_id, request.options, run is not None
        output = None if run is None or run.show != "full" or request.output is None else run.redact(request.output)
        withheld = None if output is not None else "its crew is not known here, or does not show it."
    elif waits:
        task_id, options, seen = record.human_task if status is None else waiting_task(status), (), status is not None
        output, withheld = await _shown(run, status, len(answers))
    else:
        return None
    return PendingReview(
        record=record,
        task_id=run.redact_name(task_id) if run is not None and seen and task_id is not None else task_id,
        round=1 if task_id is None else next_round(answers, task_id),
        since=record.human_since,
        output=output,
        withheld=withheld,
        answers=answers,
        seen=seen,
        options=options,
    )


async def _status(run: OpenRun) -> CrewStatus | None:
    try:
        async with CrewSession(run.crew, withhold=run.withholding()) as session:
            return await session.call(lambda client: client.status(run.kickoff_id))
    except CrewError:
        return None  # then what is on record has to do


async def _shown(run: OpenRun | None, status: CrewStatus | None, answers: int) -> tuple[str | None, str | None]:
    """Return what is to be judged as it may be shown, else why it is not."""
    if run is None or status is None:
        return None, "its crew's server was not asked. Look at the crew's page, or give --crew."
    output, where = judged_output(status), where_to_look(run)
    if question_digest(status) is None and run.record is not None and run.record.has_webhooks:
        output = await kept_output(run.record, answers) or output
    if output is not None and run.show == "full":
        return run.redact(output), None
    if output is not None:
        return None, f"{len(output):,} characters that this crew does not show. {where}"
    so_far = outputs_so_far(status) if run.show == "full" else None
    others = "" if so_far is None else f" Other tasks gave:\n\n{run.redact(so_far)}"
    return None, f"the status does not show it. {where}{others}"


async def find_run_in_flight(name: str, stores: Sequence[ReviewableStore]) -> tuple[RunRecord, ReviewableStore]:
    """Return the run in flight that an idempotency key, a kickoff id or the beginning of one names, and where it is on
    record.

    Raises:
        CrewError: There is none, several begin so, or it has ended.
    """
    named = await _named(name, stores)
    if named is None:
        raise CrewError(f"No run in flight is {name!r}. prefect-crew reviews lists those that wait for a person.")
    record = named[0]
    if record.phase is RecordPhase.ENDED:
        raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: it has ended ({record.state}).")
    if record.phase is not RecordPhase.STARTED or record.kickoff_id is None:
        raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: its kickoff is {record.phase}.")
    return named


async def _named(name: str, stores: Sequence[ReviewableStore]) -> tuple[RunRecord, ReviewableStore] | None:
    for store in stores:
        if attempts := await store.attempts(name):
            return attempts[-1], store
    for store in stores:
        record = await store.of_kickoff(name)
        # A ledger knows the runs of all batches that are kept in it.
        if record is not None and await store.attempts(record.idempotency_key):
            return record, store
    found = [
        (one, store)
        for store in stores
        async for one in store.may_ask()
        if str(one.kickoff_id).startswith(name) or one.idempotency_key.startswith(name)
    ]
    if len(found) > 1:
        ids = ", ".join(str(one.kickoff_id) for one, _ in found[:5])
        raise CrewError(f"{len(found)} runs in flight begin with {name!r}: {ids}. Give more of it.")
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
    """Answer for the person that a run on record waits for, and return what is on record of it.

    Raises:
        CrewError: As `answer_question`, which has the arguments.
    """
    run = OpenRun(crew=crew, kickoff_id=str(record.kickoff_id), record=record)
    after = crew.wait.next_round_after
    async with CrewSession(crew, withhold=run.withholding()) as session:
        _, sent = await answer_question(
            run, session, records, review, by=by, task_id=task_id, round=round, next_round_after=after, looks=LOOKS
        )
    return sent


async def resume_run(
    crew: Crew,
    kickoff_id: str,
    *,
    feedback: str,
    approve: bool,
    task_id: str | None = None,
    webhooks: Webhooks | None = None,
    call: str | None = None,
) -> ResumeAnswer:
    """Answer for the person that a run waits for, whether or not it is on record.

    Args:
        crew, kickoff_id: The run.
        feedback, approve: The answer: approve a task's output, or have it done again with the feedback.
        task_id: The task; left out, the one that the status names.
        webhooks: The kickoff's webhooks again: the server does not carry them over.
        call: The name of the call, the same on every retry of it.

    Raises:
        CrewError: As `answer_question`: it is sent once for each question. Or the run may be a row of a batch.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent twice.
    """
    run = await find_run(crew, kickoff_id)
    if run.record is None:
        await _refuse_row_of_batch(run)
    async with CrewSession(crew, withhold=run.withholding()) as session:
        answer, _ = await answer_question(
            run,
            session,
            PrefectRecords(),
            Review(approve=approve, feedback=feedback),
            by="resume_crew",
            task_id=task_id,
            next_round_after=crew.wait.next_round_after,
            webhooks=webhooks,
            looks=LOOKS,
            call=call,
        )
    return answer


async def _refuse_row_of_batch(run: OpenRun) -> None:
    """Raise if a run without a record may be a row of a batch: the answers to that are on record in its ledger."""
    wanted = {"variables": {"tags": {"all_": [ASKS]}}, "limit": 200}
    try:
        async with get_client() as client:
            found = (await client.request("POST", "/variables/filter", json=wanted)).json()
    except (httpx.HTTPError, PrefectException) as error:
        raise CrewError(
            f"Whether run {run.kickoff_id} is a row of a batch cannot be read now ({error!r}). Nothing was sent."
        ) from error
    for batch in [one["value"] for one in found]:
        if batch.get("crew_url", run.crew.url) == run.crew.url:
            raise CrewError(
                f"Run {run.kickoff_id} is not on record on the Prefect server and may be a row of batch "
                f"{batch.get('batch')!r}, so nothing was sent. Answer a row with prefect-crew reviews approve "
                f"{shlex.quote(run.kickoff_id)}, or reject; any other run on the crew's own page."
            )
