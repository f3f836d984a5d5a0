"""Answer for a person, from outside of the wait."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.client.models import ResumeAnswer
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import ReviewStore
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import LOOKS, answer_question
from prefect_crew.runs.reviews.questions import Review
from prefect_crew.runs.run import OpenRun, find_run

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


RECORDS = PrefectRecords()


async def resume_run(
    crew: Crew,
    kickoff_id: str,
    *,
    feedback: str,
    approve: bool,
    task_id: str | None = None,
    webhooks: Webhooks | None = None,
    by: str = "resume_crew",
    run: OpenRun | None = None,
    records: ReviewStore | None = RECORDS,
    call: str | None = None,
) -> ResumeAnswer:
    """Answer for the person that a run waits for: approve a task's output, or have it done again with the feedback.

    Args:
        task_id: The task; left out, the one that the status names.
        webhooks: The kickoff's webhooks again: the server does not carry them over.
        by: Who answers, for the record.
        call: As for `answer_question`.
        run, records: The run and where its answers are kept, where the caller knows them; `records` None keeps none.

    Raises:
        CrewError: As `answer_question`: it is sent once for each question. Or the run may be a row of a batch whose
            ledger cannot be opened here.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent twice.
    """
    run = run or await find_run(crew, kickoff_id)
    async with AsyncExitStack() as stack:
        if run.record is None and records is not None:
            run, records = await stack.enter_async_context(_row_of_a_batch(run, records))
        session = await stack.enter_async_context(CrewSession(crew, withhold=run.withholding()))
        answer, _ = await answer_question(
            run,
            session,
            records,
            Review(approve=approve, feedback=feedback),
            by=by,
            task_id=task_id,
            next_round_after=crew.wait.next_round_after,
            webhooks=webhooks,
            looks=LOOKS,
            call=call,
        )
    return answer


@asynccontextmanager
async def _row_of_a_batch(run: OpenRun, records: ReviewStore) -> AsyncGenerator[tuple[OpenRun, ReviewStore]]:
    """Give a run that has no record on the Prefect server as the ledger of its batch knows it, and where answers go.

    A run that is no row is given as it is. Which rows wait for people is what their batches' processes have seen.

    Raises:
        CrewError: A ledger that may know it cannot be opened here: whether it was answered is not known.
    """
    from prefect_crew.batches.stored import batches_waiting_for_people

    async with AsyncExitStack() as stack:
        try:
            batches, missed = await stack.enter_async_context(batches_waiting_for_people(run.crew.url))
        except (httpx.HTTPError, PrefectException) as error:
            raise CrewError(
                f"Whether run {run.kickoff_id} is a row of a batch cannot be read now ({error!r}). Nothing was sent."
            ) from error
        for batch in batches:
            record = await batch.ledger.of_kickoff(run.kickoff_id)
            # A ledger knows the runs of all batches that are kept in it.
            if record is not None and await batch.ledger.attempts(record.idempotency_key):
                yield OpenRun(run.crew, run.kickoff_id, record), batch.ledger
                return
        if missed:
            raise CrewError(
                f"Run {run.kickoff_id} has no record on the Prefect server. {missed[0]} It may be one of them, so "
                "nothing was sent. Answer where that ledger can be opened: prefect-crew reviews. Or answer on the "
                "crew's own page."
            )
        yield run, records
