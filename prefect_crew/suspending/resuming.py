"""Bringing suspended flow runs back: by the receiver when a webhook comes, and by a sweep for all that webhooks miss.

Whoever it is asks the crew's status first and resumes only a flow run that is suspended by this package. Resuming is
harmless to do twice or for nothing: the flow run looks at its run, and is suspended again if that goes on.
"""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectException

from prefect_crew.api.errors import CrewError
from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.events import emit
from prefect_crew.logs import run_logger
from prefect_crew.open_runs import OpenRun
from prefect_crew.receiver.settling import load_crew
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RecordPhase, RunRecord, utcnow
from prefect_crew.reviewing.forms import excuse, shown_with
from prefect_crew.reviews import asked_of
from prefect_crew.sessions import CrewSession
from prefect_crew.stopping import close_stopped, stop_once
from prefect_crew.suspending.suspended import SuspendedWait, SuspendedWaits
from prefect_crew.suspending.suspension import PAUSE_KEY
from prefect_crew.waiting import Phases

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew

__all__ = ["Attended", "attend", "due", "resume_once", "sweep"]

AT_ONCE = 8
"""Runs that are asked for at the same time."""
BLIND_AFTER = 300.0
"""Seconds after which a flow run is resumed to look for itself, where its crew cannot be asked from here."""


class Attended(StrEnum):
    """What became of one suspended flow run."""

    RESUMED = "resumed"
    LEFT = "left suspended"
    """Its crew goes on."""
    PERSON = "left suspended, a person is waited for"
    NOT_YET = "not suspended at this moment"
    """It is about to be, or it goes on already."""
    OVER = "over"
    """The flow run has ended, or is gone."""
    NO_ANSWER = "no answer"
    """The crew's server, or the Prefect API, gave none."""


@dataclass(frozen=True)
class _Look:
    """What is known of a run: its record, None where it was pruned; its status, None where nobody could be asked.

    `answers`: how many answers of people are on record, as far as somebody needs to know.
    """

    record: RunRecord | None
    status: CrewStatus | None
    blind: bool = False
    answers: int = 0


def due(
    wait: SuspendedWait, record: RunRecord | None, status: CrewStatus | None, now: datetime, answers: int = 0
) -> bool:
    """Return whether a run needs a flow run that is suspended for it. Pure.

    That is so when it has ended, is lost, waits for a person whom the flow run can ask and does not ask already, goes
    on since somebody has answered what it asks, is over its time, or is not on record any more: the flow run then finds
    out, and fails as it would have without being suspended.
    """
    if record is None or record.phase is not RecordPhase.STARTED:
        return True
    if status is None:
        return False
    if status.state.ended:
        return True
    waiting = status.state is CrewState.WAITING
    if waiting and wait.asks and not wait.asks_for(asked_of(status), answers):
        return True
    if wait.asked is not None and not waiting and status.state is not CrewState.UNKNOWN:
        return True
    phases = _phases(record)
    phases.human_extra = wait.human_extra
    if status.state is CrewState.UNKNOWN:
        return now.timestamp() - phases.kicked_off_at >= wait.policy.grace
    left = phases.left(wait.policy, status.state, now.timestamp())
    return left is not None and left[2] <= 0


def _phases(record: RunRecord) -> Phases:
    return Phases(
        kicked_off_at=(record.kicked_off_at or record.claimed_at).timestamp(),
        human_seconds=record.human_seconds,
        human_since=None if record.human_since is None else record.human_since.timestamp(),
    )


# Prefect's side


async def resume_once(flow_run_id: str) -> Attended:
    """Resume a flow run that this package has suspended; any other is left as it is.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    async with get_client() as client:
        flow_run = await _flow_run(flow_run_id)
        if flow_run is None or flow_run.state is None or flow_run.state.is_final():
            return Attended.OVER
        if not _ours(flow_run.state):
            return Attended.NOT_YET
        await excuse(flow_run.state, flow_run_id)
        answer = await client.resume_flow_run(UUID(flow_run_id))
    if answer.status is SetStateStatus.ACCEPT:
        return Attended.RESUMED
    # It was resumed by somebody else meanwhile, or Prefect's own timeout has just ended it.
    over = answer.state is not None and answer.state.is_final()
    return Attended.OVER if over else Attended.NOT_YET


def _ours(state: State) -> bool:
    return state.is_paused() and (state.state_details.pause_key or "").startswith(PAUSE_KEY)


async def _asks_in_vain(flow_run_id: str) -> bool:
    """Return whether a flow run is suspended with a question and without a form: its process died in between."""
    flow_run = await _flow_run(flow_run_id)
    state = None if flow_run is None else flow_run.state
    return state is not None and _ours(state) and not await shown_with(state, flow_run_id)


async def _flow_run(flow_run_id: str) -> FlowRun | None:
    async with get_client() as client:
        try:
            return await client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            return None


# The crew's side


async def _look(
    waits: Sequence[SuspendedWait],
    records: PrefectRecords,
    load: Callable[[RunRecord], Awaitable[DeployedCrew | None]],
) -> _Look:
    """Read a run's record and its status, and bring whose turn it is up to date on both.

    Raises:
        CrewError: The crew's server gave no answer.
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    run_key, attempt = waits[0].run_key, waits[0].attempt
    record = next((one for one in await records.attempts(run_key) if one.attempt == attempt), None)
    if record is None or record.phase is not RecordPhase.STARTED:
        return _Look(record, None)
    crew = await load(record)
    if crew is None:
        return _Look(record, None, blind=True)
    run = OpenRun(crew=crew, kickoff_id=str(record.kickoff_id), record=record)
    async with CrewSession(crew, withhold=run.withholding()) as session:
        status = await session.asked(lambda client: client.status(run.kickoff_id))
    if not status.state.ended and status.state is not CrewState.UNKNOWN:
        await _note_turn(run, record, status, records, asks=any(wait.asks for wait in waits))
    asked = status.state is CrewState.WAITING and any(wait.asked is not None for wait in waits)
    return _Look(record, status, answers=len(await records.reviews(record)) if asked else 0)


async def _note_turn(
    run: OpenRun, record: RunRecord, status: CrewStatus, records: PrefectRecords, *, asks: bool
) -> None:
    """Write down that a person's turn began or ended: their time is not the crew's, and somebody has to be told.

    `asks`: a flow run does that itself, once it is resumed to ask.
    """
    phases = _phases(record)
    if not phases.see(status.state, utcnow().timestamp()):
        return
    waiting = phases.human_since is not None
    record.human_seconds = phases.human_seconds
    record.human_since = utcnow() if waiting else None
    await records.save(record)
    if waiting and asks:
        return
    emit("waiting" if waiting else "resumed", record)
    if waiting:
        run_logger().warning(
            "Crew run %s waits for a person, and its flow run is suspended. Answer on the crew's page, or: "
            "prefect-crew resume %s %s --approve or --reject, with --feedback TEXT.",
            run.kickoff_id,
            shlex.quote(run.crew.label),
            shlex.quote(run.kickoff_id),
        )
    if (trouble := await run.shown_by().update(run.view(status))) is not None:
        run_logger().warning("The artifact of run %s could not be updated: %s", run.kickoff_id, trouble)


# Both


async def attend(
    waits: Iterable[SuspendedWait],
    records: PrefectRecords | None = None,
    *,
    load: Callable[[RunRecord], Awaitable[DeployedCrew | None]] = load_crew,
    eager: bool = False,
) -> dict[str, Attended]:
    """Look at one run, and resume the flow runs that are suspended for it where it needs them.

    Args:
        waits: Who is suspended for it: for one and the same attempt.
        records: The record store.
        load: Finds the crew whose server is asked.
        eager: Resume them also where the crew cannot be asked from here, since a webhook says that there is news.

    Returns what became of each, by the ids of the flow runs. It raises nothing but a cancellation.
    """
    waits, records = list(waits), records or PrefectRecords()
    if not waits:
        return {}
    try:
        alive = [wait for wait in waits if not await _ended(wait, records, load)]
        found = dict.fromkeys((wait.flow_run_id for wait in waits), Attended.OVER)
        if not alive:
            return found
        look = await _look(waits, records, load)
        for wait in alive:
            found[wait.flow_run_id] = await _decide(wait, look, eager)
    except (CrewError, httpx.HTTPError, PrefectException) as error:
        run_logger().warning("Run %s could not be looked after: %s", waits[0].run_key, error)
        return dict.fromkeys((wait.flow_run_id for wait in waits), Attended.NO_ANSWER)
    return found


async def _decide(wait: SuspendedWait, look: _Look, eager: bool) -> Attended:
    blind = look.blind and (eager or (utcnow() - wait.since).total_seconds() >= BLIND_AFTER)
    needed = blind or due(wait, look.record, look.status, utcnow(), look.answers)
    if needed or (wait.asked is not None and await _asks_in_vain(wait.flow_run_id)):
        return await resume_once(wait.flow_run_id)
    waiting = look.status is not None and look.status.state is CrewState.WAITING
    return Attended.PERSON if waiting else Attended.LEFT


async def _ended(
    wait: SuspendedWait, records: PrefectRecords, load: Callable[[RunRecord], Awaitable[DeployedCrew | None]]
) -> bool:
    """Return whether a flow run has ended or is gone; then nobody needs its note, and a cancelled one's crew stops."""
    flow_run = await _flow_run(wait.flow_run_id)
    state = None if flow_run is None else flow_run.state
    if state is not None and not state.is_final() and not (state.is_cancelling()):
        return False
    if state is not None and (state.is_cancelled() or state.is_cancelling()):
        await _stop(wait, records, load)
    await SuspendedWaits(records).remove(wait.name)
    return True


async def _stop(
    wait: SuspendedWait, records: PrefectRecords, load: Callable[[RunRecord], Awaitable[DeployedCrew | None]]
) -> None:
    """Stop the crew of a flow run that was cancelled while it was suspended, unless somebody else waits for it."""
    record = next((one for one in await records.attempts(wait.run_key) if one.attempt == wait.attempt), None)
    if record is None or record.phase is not RecordPhase.STARTED:
        return
    crew = await load(record)
    if crew is None or await records.other_waiters(record, wait.flow_run_id):
        run_logger().warning("Crew run %s is left running at %s.", record.kickoff_id, record.crew_url)
        return
    run = OpenRun(crew=crew, kickoff_id=str(record.kickoff_id), record=record)
    async with CrewSession(crew, withhold=run.withholding()) as session:
        await close_stopped(record, await stop_once(session, record), records)


async def sweep(
    records: PrefectRecords | None = None,
    *,
    load: Callable[[RunRecord], Awaitable[DeployedCrew | None]] = load_crew,
    at_once: int = AT_ONCE,
) -> Counter[Attended]:
    """Look at every run that a suspended flow run waits for, `at_once` side by side, and count what came of it.

    A flow run that waits for several runs counts once for each.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    records = records or PrefectRecords()
    of_run: defaultdict[tuple[str, int], list[SuspendedWait]] = defaultdict(list)
    async for wait in SuspendedWaits(records).all():
        of_run[wait.run_key, wait.attempt].append(wait)
    gate = asyncio.Semaphore(at_once)

    async def one(waits: list[SuspendedWait]) -> dict[str, Attended]:
        async with gate:
            return await attend(waits, records, load=load)

    found: Counter[Attended] = Counter()
    for outcome in await asyncio.gather(*map(one, of_run.values())):
        found.update(outcome.values())
    return found
