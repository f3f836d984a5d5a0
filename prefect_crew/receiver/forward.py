"""Hands on what the receiver takes: to the Prefect server, and at once to the processes that wait for runs.

One task with two bounded queues forwards to Prefect. The latest webhooks are kept for processes that ask for what came
after the last one that they have. Such an answer is held back until there is something to say. So a webhook reaches a
waiting process within milliseconds, while Prefect's events, which automations read, take a second, and longer when many
come at once. What an event says of a run stands in the signed URL, so no webhook costs a request for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.context import AsyncClientContext
from prefect.settings import get_current_settings

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import OneLine
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, STATUS_ERRORS, TRANSPORT_ERRORS
from prefect_crew.artifacts.events import emit
from prefect_crew.blocks import find_crew
from prefect_crew.client.models import ReviewRequest
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.receiver.events import WebhookEvent, event_name, prefect_event
from prefect_crew.records.notes import MAX_OUTPUT, keep_output, keep_question
from prefect_crew.records.resolve import Resolution, attempt_of, resolve_from_webhook
from prefect_crew.records.store import PrefectRecords
from prefect_crew.webhooks import CALLED, WAKING

logger: OneLine = OneLine(logging.getLogger("prefect_crew.receiver"), {})

QUEUE = 2000  # Events that wait at most, about 3 KB each. Then the oldest is dropped.
NOTES = 500  # texts that people are to judge, which wait to be stored at most, up to 1 MiB each
BATCH = 50  # events that are sent in one request
ATTEMPT = 10.0  # seconds for one attempt to send a batch: Prefect's client would retry for a minute by itself
AT_ONCE = 8  # requests to the Prefect API at the same time
REMEMBERED = 1000  # runs whose records were looked at, and texts that were stored, that are remembered
LOOK_AFTER, LOOK_AT_ONCE = 3.0, 100
"""Seconds after the first webhook of a run after which its record is looked at, and how many records in one request."""
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


class RecentWebhooks:
    """The latest webhooks that end pauses or tell tokens, in the order in which they came. Of one event loop.

    A cursor names the last webhook that a process has, and the start of this receiver: another one has not the same.
    """

    def __init__(self) -> None:
        self._start = uuid4().hex[:8]
        self._last = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self._held = 0
        self._is_closing = False

    def add(self, event: WebhookEvent) -> None:
        """Keep a webhook that processes wait for, and answer them. Others are not kept."""
        name, hook = event_name(event), event.hook
        if name not in (*WAKING, CALLED):
            return
        self._kept.append(
            {
                "id": str(event.id),
                "event": name,
                "idempotency_key": hook.idempotency_key,
                "attempt": hook.attempt,
                "round": hook.round,
                "said": dict(event.said),
            }
        )
        self._last += 1
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        """Answer all who wait, and hold no answer back any more: the server is about to stop."""
        self._is_closing = True
        self._news.set()

    async def after(self, cursor: str) -> dict[str, Any] | None:
        """Return the webhooks after a cursor, the cursor after them, and whether some between were lost.

        A process without a cursor of this start gets the latest ones. Without a webhook it waits up to `HOLD` seconds
        for one. None: too many wait already.
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
    """Turns webhooks into events on the Prefect server of this process's settings.

    `put` never waits. The task begins with `start` or with the first `put`, and ends with `aclose`.

    Raises:
        ConfigurationError: No Prefect API is set: nobody would read events on an embedded server.
    """

    def __init__(self, *, limit: int = QUEUE) -> None:
        if not get_current_settings().api.url:
            raise ConfigurationError(
                "The receiver needs the Prefect API that your flows use: set PREFECT_API_URL, such as "
                "http://127.0.0.1:4200/api, or choose a profile that has it."
            )
        self.recent = RecentWebhooks()
        self._records = PrefectRecords()
        self._events: deque[WebhookEvent] = deque(maxlen=limit)
        self._notes: deque[WebhookEvent | ReviewRequest] = deque(maxlen=NOTES)
        self._unseen: dict[RunName, WebhookEvent] = {}
        self._seen: dict[RunName, None] = {}
        self._looking: asyncio.Task[None] | None = None
        self._stored: dict[tuple[str, int | None, int], int] = {}
        self._resolving: dict[RunName, asyncio.Task[None]] = {}
        self._counts: Counter[str] = Counter()
        self._is_away: bool | None = None
        self._is_closing = False
        self._news = asyncio.Event()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to forward; harmless if it has begun."""
        if self._task is None and not self._is_closing:
            self._task = asyncio.create_task(self._run(), name="forward webhooks")

    def put(self, item: WebhookEvent | ReviewRequest) -> None:
        """Take an event, or the question of a Flow. Where there is no room, the oldest is dropped."""
        self._counts["received"] += 1
        is_question = isinstance(item, ReviewRequest)
        if is_question:  # a Flow waits for one answer at a time: its question before has been answered
            others = (note for note in self._notes if getattr(note, "kickoff_id", None) != item.kickoff_id)
            self._notes = deque(others, NOTES)
        if is_question or (item.output and len(item.output) <= MAX_OUTPUT and item.hook.attempt is not None):
            self._counts["dropped"] += len(self._notes) == NOTES and isinstance(self._notes[0], ReviewRequest)
            self._notes.append(item)  # it is stored before anybody is woken who reads it
        else:
            self.recent.add(item)
        if not is_question:
            self._counts["dropped"] += self._is_full
            self._events.append(replace(item, output=None))
            self._note_run(item)
        self.start()
        self._news.set()

    @property
    def _is_full(self) -> bool:
        return len(self._events) == self._events.maxlen

    @property
    def is_ready(self) -> bool:
        """Whether what is taken now reaches Prefect, at once or later."""
        return not self._is_closing and not (self._is_away and (self._is_full or len(self._notes) == NOTES))

    @property
    def _questions(self) -> int:
        return sum(isinstance(note, ReviewRequest) for note in self._notes)

    def report(self) -> dict[str, Any]:
        """Return how Prefect answers, what waits, and how much was received, forwarded, dropped, refused, resolved."""
        prefect = {None: "not asked yet", True: "away", False: "answers"}[self._is_away]
        counts = {name: self._counts[name] for name in ("received", "forwarded", "dropped", "refused", "resolved")}
        return {"prefect": prefect, **counts, "waiting": len(self._events) + self._questions}

    async def aclose(self) -> None:
        """Forward what is left, for five seconds at most, and end."""
        self._is_closing = True
        self._news.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLOSE_WITHIN)
        for task in (self._task, self._looking, *self._resolving.values()):
            if task is not None:
                await cancel_and_wait(task)
        if self._events:
            logger.warning(
                "%d webhooks were not forwarded to Prefect before the receiver stopped; waits find out by polling.",
                len(self._events),
            )
        if self._questions:
            logger.warning(
                "%d questions of Flows were not kept before the receiver stopped: answer them on the platform.",
                self._questions,
            )

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await _reach_prefect()
                self._say_whether_away(None)
                pause = FIRST_PAUSE
                async with AsyncClientContext.get_or_create():
                    return await self._forward()
            except Exception as error:  # without this task nothing is forwarded any more, and nobody would know why
                if not _is_transient(error):
                    logger.exception("Forwarding webhooks to Prefect failed; it continues in a moment.")
                self._say_whether_away(error)
            await asyncio.sleep(min(pause, FIRST_PAUSE if self._is_closing else LONGEST_PAUSE))
            pause *= 2

    async def _forward(self) -> None:
        """Forward what comes, until the end.

        Raises:
            Exception: Prefect takes nothing now, for which `_is_transient` is true; or what nobody expected.
        """
        while True:
            self._news.clear()
            # What could not be sent stays in its queue. Texts first: a wait that is woken reads them. Many of them hold
            # up no more than one batch of events.
            while self._notes or self._events:
                if self._notes and len(self._events) <= BATCH:
                    notes = list(itertools.islice(self._notes, AT_ONCE))
                    await asyncio.gather(*map(self._store, notes))
                    _remove(self._notes, notes)
                else:
                    batch = list(itertools.islice(self._events, BATCH))
                    await self._send(batch)
                    _remove(self._events, batch)
                self._say_whether_away(None)
            if self._is_closing:
                return
            await self._news.wait()

    def _say_whether_away(self, problem: Exception | None) -> None:
        """Log once that the Prefect API went away, and once that it is back."""
        if problem is not None and not self._is_away:
            logger.warning("The Prefect API does not take events (%s); webhooks wait.", _what(problem))
        elif problem is None and self._is_away:
            logger.info("The Prefect API takes events again.")
        self._is_away = problem is not None

    async def _store(self, note: WebhookEvent | ReviewRequest) -> None:
        """Store a question, which nobody sends a second time."""
        try:
            async with asyncio.timeout(ATTEMPT):
                await (keep_question(note) if isinstance(note, ReviewRequest) else self._store_output(note))
        except Exception as error:
            # One odd text must not hold up all others, nor a key that may write events and no blocks.
            if _is_transient(error) and _what(error) != "HTTP 403":
                raise
            logger.warning("The question of a run could not be stored: %s", _what(error))
        if isinstance(note, WebhookEvent):
            self.recent.add(note)

    async def _store_output(self, event: WebhookEvent) -> None:
        hook, digest = event.hook, hash(event.output)
        question = (hook.idempotency_key, hook.attempt, hook.round)
        # A server may send it again and again, also after it was answered and forgotten.
        if self._stored.get(question) == digest:
            return
        await keep_output(hook.idempotency_key, hook.attempt or 1, hook.round, event.output or "")
        if len(self._stored) >= REMEMBERED:
            self._stored.clear()
        self._stored[question] = digest

    async def _send(self, batch: Sequence[WebhookEvent]) -> None:
        """Send events. Those that Prefect refuses are counted and given up, and hold up no others."""
        try:
            await asyncio.wait_for(self._post(batch), ATTEMPT)
        except Exception as error:
            if _is_transient(error):
                raise  # all of them are sent again, under the same ids
            if len(batch) > 1:
                for event in batch:
                    await self._send([event])
                return
            self._counts["refused"] += 1
            if self._counts["refused"] == 1:
                logger.warning(
                    "Prefect refuses a %s webhook of run %s: %s. Further ones are only counted, in /ready.",
                    batch[0].name,
                    batch[0].hook.idempotency_key,
                    _what(error),
                )

    async def _post(self, batch: Sequence[WebhookEvent]) -> None:
        events = [prefect_event(event) for event in batch]
        async with get_client() as client:
            await client.request("POST", "/events", json=events)  # pyright: ignore[reportArgumentType] - a true route
        self._counts["forwarded"] += len(batch)

    # Uncertain kickoffs

    def _note_run(self, event: WebhookEvent) -> None:
        """Have the record of a run looked at, once: whether its kickoff is uncertain, which a webhook can resolve."""
        name = event.hook.idempotency_key, event.hook.attempt
        if event.kickoff_id is None or event.hook.attempt is None or name in self._seen:
            return
        if self._is_closing or len(self._unseen) >= REMEMBERED:
            return
        self._unseen.setdefault(name, event)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="look at the records of runs")

    async def _look(self) -> None:
        """Look at the records of runs whose webhooks have come, many in one request. A kickoff that is under way may
        be answered by then."""
        while self._unseen:
            await asyncio.sleep(LOOK_AFTER)
            some = dict(itertools.islice(self._unseen.items(), LOOK_AT_ONCE))
            try:
                unresolved = await asyncio.wait_for(self._records.unresolved_among(some), ATTEMPT)
            except (*PREFECT_ERRORS, TimeoutError) as error:
                logger.debug("The records of runs could not be read: %s", _what(error))
                continue
            for name, event in some.items():
                del self._unseen[name]
                if name in unresolved:
                    self._begin_to_resolve(event, str(event.kickoff_id))  # if that is in vain, its next webhook tries
                else:
                    if len(self._seen) >= REMEMBERED:
                        self._seen.clear()
                    self._seen[name] = None

    def _begin_to_resolve(self, event: WebhookEvent, kickoff_id: str) -> None:
        name = event.hook.idempotency_key, event.hook.attempt
        if name in self._resolving or len(self._resolving) >= RESOLVING or self._is_closing:
            return
        task = self._resolving[name] = asyncio.create_task(self._resolve(event, kickoff_id))
        task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, event: WebhookEvent, kickoff_id: str) -> None:
        """Resolve a run whose kickoff is uncertain: tried again while that may succeed a little later."""
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
                "Idempotency key %s stays uncertain: its webhook names run %r (%s). To resolve it: prefect-crew runs "
                "resolve",
                key,
                kickoff_id,
                outcome,
            )


def _remove(queue: deque[Any], done: Sequence[object]) -> None:
    """Remove the first of a queue; some of them may have been dropped meanwhile."""
    ids = set(map(id, done))
    while queue and id(queue[0]) in ids:
        queue.popleft()


async def _reach_prefect() -> None:
    """Raise what keeps the Prefect API from being reached. A client of its own: an unanswered start leaves one open."""
    async with get_client() as client:
        problem = await asyncio.wait_for(client.api_healthcheck(), ATTEMPT)
    if isinstance(problem, TRANSPORT_ERRORS):
        raise problem


def _is_transient(error: Exception) -> bool:
    """Return whether the Prefect API may take the same a little later: it is away, overloaded, or refuses our key."""
    if isinstance(error, STATUS_ERRORS):
        return error.response.status_code >= 500 or error.response.status_code in (401, 403, 408, 429)
    return isinstance(error, (*TRANSPORT_ERRORS, TimeoutError))


def _what(problem: Exception) -> str:
    if isinstance(problem, STATUS_ERRORS):
        return f"HTTP {problem.response.status_code}"
    return type(problem).__name__
