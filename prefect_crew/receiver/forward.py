"""Forwards webhook events to the Prefect server in the background."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.context import AsyncClientContext
from prefect.exceptions import PrefectException
from prefect.settings import get_current_settings

from prefect_crew._internal.prefect_api import OneLine
from prefect_crew.blocks import find_crew
from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.receiver.events import News, Rank, RecordCache, event_of, resolved_event, send_events, transient
from prefect_crew.records.model import RecordStore, RunRecord
from prefect_crew.records.notes import keep_output, keep_request
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.webhook_resolve import Resolution, attempt_of, resolve_from_webhook, unresolved


class SheddingQueue:
    """Holds at most `limit` pieces of news; the oldest of the lowest rank goes when there is no room.

    What matters most is taken first, and what came first among equals.

    Attributes:
        limit: How many it holds.
        shed: How many were given up, by kind.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._queues: dict[Rank, deque[News]] = {rank: deque() for rank in sorted(Rank, reverse=True)}
        self._held = 0

    def __len__(self) -> int:
        return self._held

    @property
    def full(self) -> bool:
        """Whether something has to go for whatever comes next."""
        return self._held >= self.limit

    def put(self, news: News) -> None:
        """Take a piece of news in, or give it up if all that is held matters more."""
        with self._lock:
            if self._held >= self.limit and not self._make_room(news.rank):
                self.shed[news.hook.kind] += 1
                return
            self._queues[news.rank].append(news)
            self._held += 1

    def put_back(self, batch: Iterable[News]) -> None:
        """Take back what `take` gave, before all that has come since; the newest of it goes where there is no room."""
        with self._lock:
            for news in reversed(list(batch)):
                if self._held >= self.limit and not self._make_room(news.rank, below=True):
                    self.shed[news.hook.kind] += 1
                    continue
                self._queues[news.rank].appendleft(news)
                self._held += 1

    def take(self, most: int) -> list[News]:
        """Return up to `most` pieces of news, and hold them no more."""
        taken: list[News] = []
        with self._lock:
            for queue in self._queues.values():
                while queue and len(taken) < most:
                    taken.append(queue.popleft())
            self._held -= len(taken)
        return taken

    def _make_room(self, rank: Rank, *, below: bool = False) -> bool:
        """Give up the oldest of the lowest rank, which must be at most `rank`, or `below` it."""
        lowest = next((one for one in reversed(self._queues) if self._queues[one]), None)
        if lowest is None or lowest > rank or (below and lowest == rank):
            return False
        self.shed[self._queues[lowest].popleft().hook.kind] += 1
        self._held -= 1
        return True


logger = OneLine(logging.getLogger("prefect_crew.receiver"), {})

REQUESTS = 1000
"""What Flows ask that waits at most while the Prefect API is away; the oldest goes."""
QUEUE = 2000
"""Pieces of news that wait at most; about 3 KB each."""
BATCH = 50
ATTEMPT = 10.0
"""Seconds for one attempt to hand a batch on: Prefect's client would retry for a minute by itself."""
NOTES_AT_ONCE = 8
"""Notes of questions that are written at the same time: each takes several requests."""
NOTES = 2000
"""Questions whose notes are remembered as written."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
CLOSE_WITHIN = 5.0
LOGGED = 10
"""Refused webhooks with a log line each; after these, every thousandth."""
RESOLVING = 100
"""Runs that are being resolved at the same time."""
RESOLVE_PAUSES = (0.0, 2.0, 10.0, 45.0, 45.0, 120.0)
"""Seconds before each attempt to resolve: by default a kickoff may be on its way for 95 s, and longer after a 429."""


class Handover:
    """Turns news into events on the Prefect server that this process's settings name.

    The thread starts with the first news, or with `start`, and ends with `aclose` or with the process.

    Raises:
        ConfigurationError: No Prefect API is set: events for an embedded server would be read by nobody.
    """

    def __init__(self, *, limit: int = QUEUE, records: RecordStore | None = None) -> None:
        if not get_current_settings().api.url:
            raise ConfigurationError(
                "The receiver needs the Prefect API that your flows use: set PREFECT_API_URL, such as "
                "http://127.0.0.1:4200/api, or choose a profile that has it."
            )
        self._queue = SheddingQueue(limit)
        self._requests: deque[FeedbackRequest] = deque(maxlen=REQUESTS)
        self._records = records or PrefectRecords()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self._closing = False
        self._away: bool | None = None
        self._in_hand = 0
        self._counts: Counter[str] = Counter()
        self._resolving: dict[tuple[str, int | None], asyncio.Task[None]] = {}
        self._kept: OrderedDict[tuple[str, int, int, str | None], str] = OrderedDict()

    # From the receiver

    def start(self) -> None:
        """Start the thread; harmless if it runs."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="prefect-crew webhooks", daemon=True)
                self._thread.start()

    def keep(self, request: FeedbackRequest) -> None:
        """Take what a Flow asks of a person; from any thread."""
        self._counts["taken"] += 1
        self._requests.append(request)
        if self._thread is None:
            self.start()
        self._call(self._news.set)

    def put(self, news: News) -> None:
        """Take a piece of news; from any thread."""
        self._counts["taken"] += 1
        self._queue.put(news)
        if self._thread is None:
            self.start()
        self._call(self._news.set)

    @property
    def ready(self) -> bool:
        """Whether what is taken now reaches Prefect, at once or later."""
        return not self._closing and not (self._away and self._queue.full)

    def report(self) -> dict[str, Any]:
        """Return counters: what was taken, handed on, shed for want of room, refused by Prefect, and waits."""
        prefect = {None: "not asked yet", True: "away", False: "answers"}[self._away]
        counts = {name: self._counts[name] for name in ("taken", "handed_on", "refused", "resolved")}
        return {
            "prefect": prefect,
            **counts,
            "waiting": len(self._queue) + self._in_hand,
            "shed": dict(self._queue.shed),
        }

    async def aclose(self) -> None:
        """Hand on what is left, for five seconds at most, and end the thread."""
        self._closing = True
        with self._lock:
            thread = self._thread
        self._call(self._stop.set)
        self._call(self._news.set)
        if thread is not None:
            await asyncio.to_thread(thread.join, CLOSE_WITHIN + 1)
        if left := len(self._queue):
            logger.warning("%d webhooks were not handed on to Prefect before the end; waits find out by polling.", left)

    def _call(self, function: Any) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it has ended in between
                loop.call_soon_threadsafe(function)

    # On the thread

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._cache = RecordCache(self._records)
        self._loop = asyncio.get_running_loop()
        pauses = _pauses()
        try:
            while True:
                try:
                    if await self._answers():
                        async with AsyncClientContext.get_or_create():
                            await self._hand_on()
                            return
                except Exception:
                    logger.exception("Handing webhooks on to Prefect failed; it goes on in a moment.")
                if self._closing:
                    return
                await self._pause(next(pauses))
        finally:
            self._loop = None
            for task in self._resolving.values():
                task.cancel()

    async def _answers(self) -> bool:
        """Whether the Prefect API answers at all; a client of its own, since an unanswered start leaves one open."""
        async with get_client() as client:
            try:
                problem = await asyncio.wait_for(client.api_healthcheck(), ATTEMPT)
            except TimeoutError as error:
                problem = error
        self._note(problem if isinstance(problem, httpx.TransportError | TimeoutError) else None)
        return not self._away

    async def _hand_on(self) -> None:
        """Hand on what comes until the end; what is left then, for five seconds more."""
        now, pauses, until = asyncio.get_running_loop().time, _pauses(), None
        while until is None or now() < until:
            if self._closing and until is None:
                until = now() + CLOSE_WITHIN
            problem = await self._keep_requests()
            batch = [] if problem is not None else self._queue.take(BATCH)
            if problem is not None:
                self._note(problem)
                await self._pause(next(pauses))
                continue
            if not batch:
                if self._closing:
                    return
                await self._news.wait()
                self._news.clear()
                continue
            self._in_hand = len(batch)
            problem = await self._try(batch)
            self._note(problem)
            if problem is not None:
                self._queue.put_back(batch)
            self._in_hand = 0
            if problem is not None:
                await self._pause(next(pauses))
            else:
                pauses = _pauses()

    async def _keep_requests(self) -> Exception | None:
        """Keep what Flows ask; return why Prefect could not take it now. Nobody sends it a second time."""
        while self._requests:
            request = self._requests[0]
            try:
                await asyncio.wait_for(keep_request(request), ATTEMPT)
            except Exception as error:  # noqa: BLE001 - one odd request must not end the keeping of all others
                if transient(error):
                    return error
                logger.warning("What run %r asks a person cannot be kept: %s", request.kickoff_id, _what(error))
            self._requests.popleft()
        return None

    async def _try(self, batch: Sequence[News]) -> Exception | None:
        """Hand a batch on; return why Prefect could not take it now, None once there is nothing to do about it."""
        try:
            await asyncio.wait_for(self._deliver(batch), ATTEMPT)
        except Exception as error:  # noqa: BLE001 - one odd delivery must not end the handing on of all others
            if transient(error):
                return error
            if len(batch) == 1:
                self._refused(batch[0], error)
                return None
        else:
            return None
        for news in batch:
            if (problem := await self._try([news])) is not None:
                return problem  # those before it are sent once more with it, under the same ids
        return None

    async def _deliver(self, batch: Sequence[News]) -> None:
        found = await self._cache.find(batch)
        records = [found[news.hook.idempotency_key, news.hook.attempt] for news in batch]
        await self._keep_outputs(batch)  # before the events, which wake whoever waits for them
        await send_events([event_of(news, record) for news, record in zip(batch, records, strict=True)])
        self._counts["handed_on"] += len(batch)
        for news, record in zip(batch, records, strict=True):
            self._resolve(news, record)

    async def _keep_outputs(self, batch: Sequence[News]) -> None:
        """Keep what people are to judge: each text of a question once, also if a batch is tried again."""
        asked = {
            (news.hook.idempotency_key, news.hook.attempt, news.hook.round, news.hook.claim): news.output
            for news in batch
            if news.output is not None and news.hook.attempt is not None
        }
        gate = asyncio.Semaphore(NOTES_AT_ONCE)

        async def keep(question: tuple[str, int, int, str | None], output: str) -> None:
            digest = hashlib.sha256(output.encode("utf-8", "surrogatepass")).hexdigest()
            if self._kept.get(question) == digest:
                return
            async with gate:
                await keep_output(*question[:3], output)
            self._kept[question] = digest
            if len(self._kept) > NOTES:
                self._kept.popitem(last=False)

        await asyncio.gather(*(keep(question, output) for question, output in asked.items()))

    def _refused(self, news: News, error: Exception) -> None:
        self._counts["refused"] += 1
        if (count := self._counts["refused"]) > LOGGED and count % 1000:
            return
        logger.error(
            "A %s webhook of run %s is no event: %s", news.name, news.hook.idempotency_key, type(error).__name__
        )

    def _note(self, problem: Exception | None) -> None:
        """Say once that the Prefect API went away, and once that it is back."""
        away = problem is not None
        if away and not self._away:
            logger.warning("The Prefect API does not take events (%s); webhooks wait.", _what(problem))
        elif self._away and not away:
            logger.info("The Prefect API takes events again.")
        self._away = away

    async def _pause(self, seconds: float) -> None:
        """Wait, but only for a moment once the end has come."""
        if self._closing:
            await asyncio.sleep(min(seconds, FIRST_PAUSE))
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    # Uncertain kickoffs

    def _resolve(self, news: News, record: RunRecord | None) -> None:
        """Begin to resolve a run whose kickoff is uncertain, beside everything else."""
        key = (news.hook.idempotency_key, news.hook.attempt)
        if record is None or not unresolved(record) or news.kickoff_id is None or self._closing:
            return
        if key not in self._resolving and len(self._resolving) < RESOLVING:
            self._resolving[key] = asyncio.create_task(self._resolve_in_time(news, news.kickoff_id))
            self._resolving[key].add_done_callback(lambda task: self._resolved(key, task))

    def _resolved(self, key: tuple[str, int | None], task: asyncio.Task[None]) -> None:
        self._resolving.pop(key, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Idempotency key %s could not be resolved by its webhook: %r", key[0], error)

    async def _resolve_in_time(self, news: News, kickoff_id: str) -> None:
        hook, outcome = news.hook, Resolution.NOT_NEEDED
        for pause in RESOLVE_PAUSES:
            await asyncio.sleep(pause)
            try:
                outcome = await resolve_from_webhook(
                    *(hook.idempotency_key, kickoff_id, self._records),
                    attempt=hook.attempt,
                    claim=hook.claim,
                    said_key=news.said_key,
                    load=find_crew,
                )
            except (httpx.HTTPError, PrefectException):
                outcome = Resolution.NO_ANSWER
            if not outcome.may_change:
                break
        if outcome is Resolution.NOT_NEEDED:
            return
        if outcome is not Resolution.RESOLVED:
            logger.warning(
                "Idempotency key %s stays uncertain: its webhook names run %r (%s). To resolve it: prefect-crew runs "
                "resolve",
                hook.idempotency_key,
                kickoff_id,
                outcome,
            )
            return
        self._counts["resolved"] += 1
        self._cache.forget(hook.idempotency_key, hook.attempt)
        logger.info(
            "Idempotency key %s is resolved: its kickoff started run %s, a webhook says.",
            hook.idempotency_key,
            kickoff_id,
        )
        with suppress(httpx.HTTPError, PrefectException):  # the record says it, too
            resolved = attempt_of(await self._records.attempts(hook.idempotency_key), hook.attempt)
            if resolved is not None:
                await send_events([resolved_event(resolved, news)])


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def _what(problem: Exception | None) -> str:
    if isinstance(problem, httpx.HTTPStatusError):
        return f"HTTP {problem.response.status_code}"
    return type(problem).__name__
