"""Posting a claimed kickoff, once, and writing down what became of it. The only place that kicks a crew off.

What is promised: never a second POST for one claim unless the first surely did not start a run.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.api.certainty import KickoffFate, kickoff_delay, kickoff_fate, post_deadline
from prefect_crew.api.errors import AuthenticationError, CrewError, KickoffUncertainError
from prefect_crew.api.redaction import withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.events import emit
from prefect_crew.input_marks import InputMarks, marks_of
from prefect_crew.interrupts import ENDINGS
from prefect_crew.logs import run_logger
from prefect_crew.receiver.targets import webhooks_for
from prefect_crew.records import Lease, RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.run_keys import RunIdentity
from prefect_crew.settings import CrewSettings
from prefect_crew.stopping import stop_if_asked

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks

__all__ = [
    "LIMITED_FOR",
    "ClaimLostError",
    "Purchase",
    "give_back",
    "giving_back",
    "post_claimed",
    "to_its_end",
    "uncertain",
]

T = TypeVar("T")
PERMIT_GOOD_FOR = 30.0
"""Seconds from asking for a permit to the first byte of its kickoff: a connection has to be made in between."""
LIMITED_FOR = 600.0
"""Seconds for which a kickoff is tried again while the server answers 429, or 503 with a time to come back."""
FINISH = 25.0
"""Seconds that a cancelled caller leaves a POST in flight to end: Prefect kills a cancelled process after about 30."""


@dataclass(frozen=True)
class Purchase:
    """What is to be bought, the same for every attempt. `inputs` are encoded, `digest` is theirs and that of
    `restore_from`.

    `quiet`: no log line, event or span attribute about the decision, for one row among thousands. `settings`: those
    that say whether there are webhooks, read by whoever makes many purchases: reading them takes 3 ms.
    """

    crew: Crew
    identity: RunIdentity
    inputs: dict[str, Any] = field(repr=False)
    digest: str
    name: str | None
    meta: Mapping[str, Any] | None = field(repr=False)
    webhooks: Webhooks | None = field(repr=False)
    force_new: bool = False
    restore_from: str | None = None
    quiet: bool = False
    settings: CrewSettings = field(default_factory=CrewSettings)
    asked_at: datetime = field(default_factory=utcnow)
    slot: str | None = None

    @cached_property
    def secret_inputs(self) -> list[str]:
        """The names of the inputs that are secret."""
        return self.crew.secret_among(self.inputs)

    @cached_property
    def marks(self) -> InputMarks | None:
        """The fingerprints of the inputs, none for a row: its ledger says with what it was run."""
        if self.quiet:
            return None
        token = self.crew.token.get_secret_value()
        return marks_of(token, self.inputs, secret=self.secret_inputs, restore_from=self.restore_from)

    def record(self, attempt: int, good_for: float = 0.0) -> RunRecord:
        """Return the record that claims an attempt, of which a permit is asked for within `good_for` seconds."""
        now, caller = utcnow(), self.identity.caller
        return RunRecord(
            run_key=self.identity.run_key,
            attempt=attempt,
            crew=self.crew.label,
            crew_url=self.crew.url,
            inputs_digest=self.digest,
            input_marks=self.marks,
            owner=caller.owner,
            claimed_at=now,
            good_for=good_for,
            post_deadline=post_deadline(self.crew.request_timeout),
            forced_by=self.identity.place if self.force_new else None,
            flow_run_id=caller.flow_run_id,
            flow_run_count=caller.flow_run_count,
            process=caller.process,
            slot=self.slot,
            step=self.name,
            secret_inputs=self.secret_inputs,
            # In the claim: whoever kicks off may be gone before anything else of it is written down.
            hooked=self.webhooks is None and bool(self.settings.webhook_url),
        )


def uncertain(record: RunRecord) -> KickoffUncertainError:
    """Return the error about a kickoff of which nobody knows what became, having told automations once."""
    reason = record.reason or "whoever sent it ended before its answer was written down"
    emit("uncertain", record, once=True, reason=reason)
    return KickoffUncertainError(run_key=record.run_key, reason=reason, sent=record.sent)


class ClaimLostError(Exception):
    """The claim is not ours any more, was decided by what is not on record any more, or was not used in time.

    Nothing was sent since.
    """


async def post_claimed(
    purchase: Purchase, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> RunRecord:
    """Post a claimed run and write its id down; POST again only what surely did not start a run.

    `lease` is the claim's.

    Raises:
        ClaimLostError: Somebody else has resolved the claim meanwhile, or its kickoff was not sent in time and it is
            given back. Nothing was posted since.
        KickoffUncertainError: It was posted, and nobody knows what became of it. That is on record.
        CrewError: It surely did not start a run. The claim is given back.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMITED_FOR
    if not record.permit:  # the claim of a ledger is its permit as well
        lease = await _take_permit(record, records, lease)
    while True:
        try:
            return await _post_and_react(purchase, record, records, session, lease)
        except (CrewError, ClaimLostError) as problem:
            if record.phase is not RecordPhase.CLAIMED:
                raise
            async with giving_back(record, records):
                delay = await _pause_after(problem, session)
                if delay is None or loop.time() + delay > until:
                    raise
            if delay and not purchase.quiet:
                run_logger().warning("%s It is sent again in %.0f s.", problem, delay)
            # Before the pause, so that nobody resolves the claim during it.
            lease = await _take_permit(record, records, lease, pause=delay)


async def _pause_after(problem: Exception, session: CrewSession) -> float | None:
    """Return the seconds after which what was surely refused is sent again, None if it is not."""
    if isinstance(problem, AuthenticationError) and await session.renew():
        return 0.0
    return kickoff_delay(problem)


@asynccontextmanager
async def giving_back(record: RunRecord, records: RecordStore) -> AsyncGenerator[None]:
    """Give a claim back for whatever is raised meanwhile: nothing that was sent for it has started a run."""
    try:
        yield
    except BaseException as problem:
        await give_back(record, records, problem)
        raise


async def to_its_end(
    work: Coroutine[Any, Any, T], then: Callable[[asyncio.Task[T]], Coroutine[Any, Any, None]] | None = None
) -> T:
    """Return what a write or a kickoff gives, which no cancellation of the caller cuts off.

    A cancellation is raised once that has ended, and `then`, which is given the task, has done what follows. After
    `FINISH` seconds it is raised anyway, and both go on beside.
    """
    task = asyncio.create_task(work)
    # An event loop that ends, as on a signal or the timeout of a flow that is not async, cancels all tasks that it
    # knows of: so it cancels the caller, which waits, and not this one.
    asyncio.tasks._unregister_task(task)  # noqa: SLF001  documented, for those who extend asyncio
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # of one that is left, nobody asks
    try:
        await asyncio.wait({task})
    except ENDINGS:
        following = None if then is None else asyncio.create_task(then(task))
        await asyncio.wait({task}, timeout=FINISH)
        if following is not None and task.done():
            await following
        raise
    return task.result()


async def _take_permit(record: RunRecord, records: RecordStore, lease: Lease, *, pause: float = 0.0) -> Lease:
    """Take the next permit of a claim, wait for `pause` seconds, and return how long it is good for.

    `lease` is that of the claim, or of the permit before. Gives the claim back where it fails or is cancelled.

    Raises:
        ClaimLostError: Somebody else has resolved the claim.
    """
    new = Lease(pause + PERMIT_GOOD_FOR)
    async with giving_back(record, records):
        # One that comes to stand late says less than what gives the claim back.
        if await to_its_end(records.permit(record, new.seconds, late=lease.over)):
            await asyncio.sleep(pause)
            return new
    record.phase = RecordPhase.NOT_STARTED  # here alone: what stands there is not ours to write
    raise ClaimLostError("somebody resolved its claim while this process was asleep, or away.")


async def _post_and_react(
    purchase: Purchase, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> RunRecord:
    """Make one POST, and see one that is in flight to its end even if the caller is cancelled."""

    async def react(post: asyncio.Task[RunRecord]) -> None:
        lease.end()  # what is not on its way yet is not sent any more
        await asyncio.wait({post})
        if post.cancelled():
            return
        if (error := post.exception()) is None:
            await stop_if_asked(session, record, records)
        # Of anything else, such as a signal raised within it, nobody knows whether it came before the POST.
        elif record.phase is RecordPhase.CLAIMED and isinstance(error, (CrewError, ClaimLostError)):
            await give_back(record, records, error)

    return await to_its_end(_post(purchase, record, records, session, lease), react)


async def _post(
    purchase: Purchase, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> RunRecord:
    """Make one POST and write down what became of it. What surely did not start a run raises and writes nothing."""
    crew, attempt, settings = purchase.crew, record.attempt, purchase.settings

    def redact(text: str) -> str:
        return crew.redactor(purchase.inputs)(text)  # hardly ever needed, and slow to make

    def last_look() -> None:
        if lease.over:
            raise ClaimLostError("its permit grew too old before its kickoff could be sent.")

    try:
        webhooks = purchase.webhooks or webhooks_for(
            crew, record.run_key, attempt=attempt, owner=record.owner, settings=settings
        )
        with withholding(redact):
            # The attempt tells two runs of one key apart, for a person who looks for the one of a record.
            meta = {**(purchase.meta or {}), "run_key": record.run_key, "run_attempt": record.attempt}
            kickoff_id = await session.client.kickoff(
                purchase.inputs,
                meta=meta,
                webhooks=webhooks,
                restore_from=purchase.restore_from,
                before_sending=last_look,
            )
    except ClaimLostError:
        raise
    except BaseException as error:
        if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
            raise
        record.phase, record.reason = RecordPhase.UNCERTAIN, redact(f"{type(error).__name__}: {error}")[:500]
        await _save(record, records)
        if not isinstance(error, Exception):
            raise
        raise uncertain(record) from error
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, kickoff_id, utcnow()
    if not purchase.quiet:
        # Before anything else: whatever fails from here on, a person finds the id in a log.
        run_logger().info("Crew %s was kicked off: run %s", record.crew, kickoff_id)
    try:
        reason = await _held_by_another(record, kickoff_id, records)
    except BaseException:
        # Cut off: that the id is on record matters more.
        await _save(record, records)
        raise
    if reason is not None:
        record.phase, record.reason = RecordPhase.UNCERTAIN, reason
        record.kickoff_id = record.kicked_off_at = None
    await _save(record, records)
    if reason is not None:
        raise uncertain(record)
    return record


async def _held_by_another(record: RunRecord, kickoff_id: str, records: RecordStore) -> str | None:
    """Return why a kickoff id cannot be that of this run, None if no other record holds it.

    A proxy that caches or deduplicates kickoffs gives one id to two of them.
    """
    try:
        holders = await records.holders(kickoff_id)
    except (httpx.HTTPError, PrefectException, CrewError):
        return None  # nor can it be written down: whoever saves it tells of that
    others = [key for key, attempt in holders if (key, attempt) != (record.run_key, record.attempt)]
    return (
        f"the crew's server answered with run {kickoff_id}, which is that of run key {others[0]!r}" if others else None
    )


async def give_back(record: RunRecord, records: RecordStore, error: BaseException) -> None:
    """Write down that a claimed run was surely not started, for this reason."""
    record.phase, record.reason = RecordPhase.NOT_STARTED, f"{type(error).__name__}"
    await _save(record, records)


async def _save(record: RunRecord, records: RecordStore) -> None:
    """Write down what is known; if that cannot be done, say it where a person finds it, and go on.

    The record then stays a claim, which later calls take for uncertain: nothing is bought twice because of it.
    """
    try:
        await records.save(record)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().error(
            "Run %s is %s%s, and that could not be written down (%s). Once the Prefect API is back: "
            "prefect-crew runs settle %s %s",
            record.run_key,
            record.phase,
            f", kickoff id {record.kickoff_id}" if record.kickoff_id else "",
            type(error).__name__,
            shlex.quote(record.run_key),
            f"--kickoff-id {shlex.quote(record.kickoff_id)}" if record.kickoff_id else "--never-started",
        )
