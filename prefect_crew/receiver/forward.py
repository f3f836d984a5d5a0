"""Passes on the webhooks that the receiver takes: at once to processes that wait for runs, then to the Prefect server.

The receiver keeps the latest webhooks for processes that ask for webhooks after their last one. It holds an answer back
until there is one, so a webhook reaches a waiting process within milliseconds. After that an end or a question becomes
an event, which automations read and Prefect's own thread sends. The signed URL has a run's facts for the event, so no
webhook waits for a request to Prefect. Seconds later one request reads the records of up to a hundred runs, since a
webhook can resolve an uncertain kickoff. A question is stored before a process is woken.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shlex
from collections import Counter, deque
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import get_current_settings

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import OneLine
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, STATUS_ERRORS, is_away
from prefect_crew.artifacts.events import emit
from prefect_crew.blocks import find_crew
from prefect_crew.client.models import ReviewRequest
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.receiver.events import WebhookEvent, event_name, prefect_event
from prefect_crew.records.notes import MAX_OUTPUT, Note, keep_note, keep_question
from prefect_crew.records.resolve import Resolution, attempt_of, resolve_from_webhook
from prefect_crew.records.store import PrefectRecords
from prefect_crew.webhooks import REPORTED, WAKING

logger: OneLine = OneLine(logging.getLogger("prefect_crew.receiver"), {})

NOTES = 500  # texts that people are to judge, which wait to be stored at most, up to 1 MiB each
ATTEMPT = 10.0  # seconds for one attempt to store a text: Prefect's client would retry for a minute by itself
AT_ONCE = 8  # texts that are stored at the same time
REMEMBERED = 1000  # runs whose records were looked at, and texts that were stored, that are remembered
REPORTS = 10_000
"""Events that are remembered. Prefect's thread has no limit of its own: an end or a question that comes again is
reported once, so a URL in the wrong hands fills no memory while the Prefect API cannot be reached."""
LOOK_AFTER, LOOK_AT_ONCE = 3.0, 100
"""Seconds from the first webhook of a run to the read of its record, and the number of records in one request."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
CLOSE_WITHIN = 5.0
RESOLVING = 100  # runs that are being resolved at the same time
RESOLVE_PAUSES = (0.0, 2.0, 10.0, 45.0, 45.0, 120.0)
"""Seconds before each attempt to resolve: by default a kickoff may be on its way for 95 s, and longer after a 429."""

KEPT = 5000  # webhooks that are kept, about 400 bytes each
MOST_IN_ANSWER = 1000  # webhooks in one answer of those
HOLD = 10.0  # Seconds for which an answer is held back at most. A server that is stopped waits for its answers.
GATHER = 0.02  # seconds for which more is waited for once there is something: runs often end together
MOST_HELD = 300  # answers that are held back at the same time

RunName = tuple[str, int | None]  # an idempotency key and an attempt at it
NoteName = tuple[str, str | None, int]
"""The name of a question: the run's key, claim and number of answers before; for a Flow, the kickoff id alone."""


class RecentWebhooks:
    """The latest webhooks that end pauses, in the order of their arrival, for one event loop.

    A cursor names the last webhook that a process has, and the start of this receiver, which no other start shares.
    """

    def __init__(self) -> None:
        self._start = uuid4().hex[:8]
        self._last = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self._held = 0
        self._is_closing = False

    def add(self, event: WebhookEvent) -> None:
        """Keep a webhook that ends pauses, and answer the processes that wait. Drop any other."""
        name, hook = event_name(event), event.hook
        if name not in WAKING:
            return
        self._kept.append(
            {
                "id": str(event.id),
                "event": name,
                "idempotency_key": hook.idempotency_key,
                "attempt": hook.attempt,
                "round": hook.round,
                "said": dict(event.facts),
            }
        )
        self._last += 1
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        """Answer all processes that wait, and hold no answer back any more, since the server is about to stop."""
        self._is_closing = True
        self._news.set()

    async def after(self, cursor: str) -> dict[str, Any] | None:
        """Return the webhooks after a cursor, the cursor after them, and whether some between were lost.

        A caller without a cursor of this start gets the latest webhooks. If there is no webhook, the call waits up to
        `HOLD` seconds for one. Return None if too many calls wait already.
        """
        start, _, number = cursor.partition("-")
        is_ours = start == self._start and number.isdecimal() and len(number) < 20 and int(number) <= self._last
        number_before = int(number) if is_ours else max(0, self._last - MOST_IN_ANSWER)
        if is_ours and number_before == self._last and not self._is_closing:
            if self._held >= MOST_HELD:
                return None
            await self._wait()
        first = self._last - len(self._kept)
        begin = max(0, number_before - first)
        webhooks = list(itertools.islice(self._kept, begin, begin + MOST_IN_ANSWER))
        return {
            "cursor": f"{self._start}-{first + begin + len(webhooks)}",
            # Without a cursor nothing was missed: the process has only just begun to wait.
            "missed": (bool(cursor) and not is_ours) or number_before < first,
            "webhooks": webhooks,
        }

    async def _wait(self) -> None:
        self._held += 1
        try:
            async with asyncio.timeout(HOLD):
                await self._news.wait()
            await asyncio.sleep(GATHER)
        except TimeoutError:
            return
        finally:
            self._held -= 1


class Forwarder:
    """Wakes the processes that wait, and reports to the Prefect server of this process's settings.

    `put` never waits. `aclose` ends the tasks that it begins.

    Raises:
        ConfigurationError: No Prefect API is set. Nobody would read events on an embedded server.
    """

    def __init__(self) -> None:
        if not get_current_settings().api.url:
            raise ConfigurationError(
                "The receiver needs the Prefect API that your flows use. Set PREFECT_API_URL, such as "
                "http://127.0.0.1:4200/api, or choose a profile that has it."
            )
        self.recent = RecentWebhooks()
        self._records = PrefectRecords()
        self._notes: dict[NoteName, WebhookEvent | ReviewRequest] = {}
        self._stored: dict[NoteName, int] = {}
        self._storing: asyncio.Task[None] | None = None
        self._reported: dict[UUID, None] = {}
        self._unseen: dict[RunName, WebhookEvent] = {}
        self._seen: dict[RunName, None] = {}
        self._looking: asyncio.Task[None] | None = None
        self._resolving: dict[RunName, asyncio.Task[None]] = {}
        self._counts: Counter[str] = Counter()
        self._is_closing = False
        self.has_unsent_events = False
        """Whether Prefect's thread may have events to send: from `start` on, until `aclose` has seen it end."""

    def start(self) -> None:
        """Connect to the Prefect server for events. The thread keeps events while a connection is lost, but drops those
        that wait 7 s for the first.
        """
        EventsWorker.instance()
        self.has_unsent_events = True

    def put(self, item: WebhookEvent | ReviewRequest) -> None:
        """Take a webhook, or the question of a Flow."""
        self._counts["received"] += 1
        if isinstance(item, ReviewRequest):
            self._keep((item.kickoff_id, None, 0), item)  # a Flow waits for one answer at a time: the latest counts
            return
        hook = item.hook
        if len(item.output or "") > MAX_OUTPUT:
            item = replace(item, output=None)
        name = hook.idempotency_key, hook.claim, hook.round
        is_question = hook.kind == "human_input"
        # A hosted crew goes on under another id after each answer, and may show its question nowhere else.
        if hook.attempt is not None and item.kickoff_id and (is_question or (hook.round and not self._has_note(name))):
            self._keep(name, item)
        else:
            self._report(item)
        self._note_run(replace(item, output=None))

    @property
    def is_ready(self) -> bool:
        """Whether the receiver would store the text of a question now, at once or later."""
        return not self._is_closing and len(self._notes) < NOTES

    def report(self) -> dict[str, int]:
        """Return how many webhooks and questions were received, how many runs resolved, how many texts of questions
        were dropped, and how many wait to be stored."""
        counts = {name: self._counts[name] for name in ("received", "resolved", "dropped")}
        return {**counts, "waiting": len(self._notes)}

    async def aclose(self) -> None:
        """Store the texts that are left, then send the events that are left, each for at most five seconds."""
        self._is_closing = True
        if self._storing is not None:
            await asyncio.wait({self._storing}, timeout=CLOSE_WITHIN)
        for task in (self._storing, self._looking, *self._resolving.values()):
            if task is not None:
                await cancel_and_wait(task)
        if self._notes:
            logger.warning(
                "The receiver stopped before it stored %d questions. Answer them on the crew's page on the platform.",
                len(self._notes),
            )
        for note in self._notes.values():
            self._report(note)
        futures = await asyncio.to_thread(EventsWorker.drain_all, timeout=CLOSE_WITHIN)
        self.has_unsent_events = isinstance(futures, tuple) and bool(futures[1])
        if self.has_unsent_events:
            logger.warning("Prefect did not take all events before the receiver stopped; waits find out by polling.")

    # Events

    def _report(self, event: WebhookEvent | ReviewRequest) -> None:
        """Wake processes that wait, then report an end or a question to Prefect once. Only store a Flow's question."""
        if isinstance(event, ReviewRequest):
            return
        self.recent.add(event)
        if event_name(event) not in REPORTED:
            return
        fields = prefect_event(event)
        if fields["id"] not in self._reported:
            if len(self._reported) >= REPORTS:
                self._reported.clear()
            self._reported[fields["id"]] = None
            emit_event(**fields)

    # Texts of questions

    def _keep(self, name: NoteName, note: WebhookEvent | ReviewRequest) -> None:
        """Have a question stored in place of its earlier text. Without room, drop the text of the oldest question."""
        if name not in self._notes and len(self._notes) >= NOTES:
            self._report(self._notes.pop(next(iter(self._notes))))
            self._counts["dropped"] += 1
        self._notes[name] = note
        if self._storing is None or self._storing.done():
            self._storing = asyncio.create_task(self._store_notes(), name="store questions")

    async def _store_notes(self) -> None:
        """Store the questions, which nobody sends twice. Repeat this while the Prefect API cannot be reached."""
        pause = FIRST_PAUSE
        while self._notes:
            notes = dict(itertools.islice(self._notes.items(), AT_ONCE))
            are_done = await asyncio.gather(*itertools.starmap(self._store, notes.items()))
            for (name, note), is_done in zip(notes.items(), are_done, strict=True):
                if is_done and self._notes.get(name) is note:  # no later text has come
                    del self._notes[name]
            if all(are_done):
                pause = FIRST_PAUSE
                continue
            await asyncio.sleep(min(pause, FIRST_PAUSE if self._is_closing else LONGEST_PAUSE))
            pause *= 2

    async def _store(self, name: NoteName, note: WebhookEvent | ReviewRequest) -> bool:
        """Store a question and report it. Return False if the Prefect API cannot be reached."""
        try:
            async with asyncio.timeout(ATTEMPT):
                await (keep_question(note) if isinstance(note, ReviewRequest) else self._store_output(name, note))
        except Exception as error:  # noqa: BLE001  one odd text must not hold up all others
            if is_away(error) or isinstance(error, TimeoutError):
                return False
            status = f"HTTP {error.response.status_code}" if isinstance(error, STATUS_ERRORS) else type(error).__name__
            logger.warning("The question of a run could not be stored: %s", status)
        self._report(note)
        return True

    def _has_note(self, name: NoteName) -> bool:
        return name in self._notes or name in self._stored

    async def _store_output(self, name: NoteName, event: WebhookEvent) -> None:
        task_id = event.facts.get("task_id") if event.hook.kind == "human_input" else None
        note = Note(event.kickoff_id, task_id, event.output)
        digest = hash(note)
        # A server may send it again and again, also after it was answered and forgotten.
        if self._stored.get(name) == digest:
            return
        await keep_note(*name, note)
        if len(self._stored) >= REMEMBERED:
            del self._stored[next(iter(self._stored))]
        self._stored[name] = digest

    # Uncertain kickoffs

    def _note_run(self, event: WebhookEvent) -> None:
        """Have the record of a run read once, because a webhook can resolve an uncertain kickoff."""
        name = event.hook.idempotency_key, event.hook.attempt
        if event.kickoff_id is None or event.hook.attempt is None or name in self._seen:
            return
        if self._is_closing or len(self._unseen) >= REMEMBERED:
            return
        self._unseen.setdefault(name, event)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="look at the records of runs")

    async def _look(self) -> None:
        """Read the records of runs whose webhooks have come, many in a request. By then, a kickoff may be answered."""
        while self._unseen:
            await asyncio.sleep(LOOK_AFTER)
            some = dict(itertools.islice(self._unseen.items(), LOOK_AT_ONCE))
            try:
                unresolved = await asyncio.wait_for(self._records.unresolved_among(some), ATTEMPT)
            except (*PREFECT_ERRORS, TimeoutError) as error:
                logger.debug("The records of runs could not be read: %s", type(error).__name__)
                continue
            for name, event in some.items():
                del self._unseen[name]
                if name in unresolved:
                    self._begin_to_resolve(event, str(event.kickoff_id))  # if that is in vain, its next webhook tries
                else:
                    if len(self._seen) >= REMEMBERED:
                        del self._seen[next(iter(self._seen))]
                    self._seen[name] = None

    def _begin_to_resolve(self, event: WebhookEvent, kickoff_id: str) -> None:
        name = event.hook.idempotency_key, event.hook.attempt
        if name in self._resolving or len(self._resolving) >= RESOLVING or self._is_closing:
            return
        task = self._resolving[name] = asyncio.create_task(self._resolve(event, kickoff_id))
        task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, event: WebhookEvent, kickoff_id: str) -> None:
        """Resolve a run whose kickoff is uncertain. Try again while this may succeed a little later."""
        hook, key, outcome = event.hook, event.hook.idempotency_key, Resolution.NOT_NEEDED
        for pause in RESOLVE_PAUSES:
            await asyncio.sleep(pause)
            try:
                outcome = await resolve_from_webhook(
                    key,
                    kickoff_id,
                    self._records,
                    attempt=hook.attempt,
                    claim=hook.claim,
                    said_key=event.said_key,
                    load=find_crew,
                )
            except PREFECT_ERRORS:
                outcome = Resolution.NO_ANSWER
            except Exception:
                logger.exception("Idempotency key %s could not be resolved by its webhook.", key)
                return
            if not outcome.may_change:
                break
        if outcome is Resolution.RESOLVED:
            self._counts["resolved"] += 1
            logger.info(
                "Idempotency key %s is resolved: according to a webhook its kickoff started %s.", key, kickoff_id
            )
            with suppress(*PREFECT_ERRORS):  # the record says it, too
                if record := attempt_of(await self._records.attempts(key), hook.attempt):
                    emit("resolved", record, once=True)
        elif outcome is not Resolution.NOT_NEEDED:
            logger.warning(
                "Idempotency key %s stays uncertain: its webhook names run %r, which could not be recorded (%s). Look "
                "at the crew's page, then run: prefect-crew runs resolve %s --kickoff-id ID, or --never-started",
                key,
                kickoff_id,
                outcome,
                shlex.quote(key),
            )
