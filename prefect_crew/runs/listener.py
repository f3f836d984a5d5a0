"""End the pauses of waits early when a webhook comes. A process has one listener for all its runs.

The listener asks the receiver, which answers within milliseconds. A webhook proves nothing and may never come: it only
brings the next status call forward. Polls go on as the policy says, so no end is seen later than without webhooks. The
receiver also counts the tokens that webhooks report: a wait asks it once, when it has seen the end.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import HTTP_ERRORS
from prefect_crew.client._parsing import as_list, as_object, tokens_of
from prefect_crew.client.models import CrewStatus
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.records.model import RunRecord, claim_of
from prefect_crew.settings import CrewSettings
from prefect_crew.webhooks import ASKED, is_prefect_cloud, latest_webhooks_of, run_name

KEPT = 300.0  # seconds for which a webhook is remembered for a waiter that begins to wait after it
MOST_KEPT = 10_000  # runs of which webhooks are remembered
AWAY = (1.0, 2.0, 5.0)
"""Seconds before the receiver is asked again, after each failure in a row; the last one for all further failures."""
ANSWER_WITHIN = 30.0  # seconds for an answer of the receiver, which holds it back for ten while there is nothing to say
TOKENS_WITHIN = 1.0  # seconds for the receiver's answer about the tokens of one run
Question = tuple[int, int]  # the attempt at the idempotency key, and how many answers of people came before, modulo 256


class Waker:
    """Ends the pauses of one waiter, on the event loop that made it."""

    def __init__(self, hub: _Hub, run: str, *, calls: bool = False) -> None:
        """`run`: the run's name at the receiver. `calls`: whether webhooks report each call of a model."""
        self._hub = hub
        self._run = run
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._asked: set[Question] = set()

    def wake(self, question: Question | None = None) -> None:
        """Report a webhook, from any thread. `question`: the question that the webhook brings, if any."""
        if question is not None:
            self._asked.add(question)
        with suppress(RuntimeError):  # the loop of a waiter that has just left is closed
            self._loop.call_soon_threadsafe(self._event.set)

    def has_question_after(self, attempt: int, answers: int) -> bool:
        """Return whether a webhook reported a question that came after so many answers of people in this attempt.

        The URLs after each answer contain the number of answers, so late news of an earlier question does not count.
        """
        return (attempt, answers % 256) in self._asked

    async def with_usage(self, status: CrewStatus) -> CrewStatus:
        """Return the status of an ended run. If it has no tokens, it gets those that webhooks have reported so far."""
        if status.usage is not None and not self._calls:
            return status
        reported = await self._hub.tokens(self._run)
        counted = {model: tokens_of(counts) for model, counts in as_object(reported.get("models")).items()}
        models = {model: tokens for model, tokens in counted.items() if tokens}
        usage = status.usage or tokens_of(reported.get("usage"))
        return status.model_copy(update={"usage": usage, "usage_by_model": models})

    async def pause(self, seconds: float) -> bool:
        """Sleep for some seconds, or until a webhook comes. Return True for a webhook."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            self._hub.warn_of_trouble()
            return False
        self._event.clear()
        return True


@dataclass
class _Run:
    """The webhooks about the runs of one key."""

    wakers: set[Waker] = field(default_factory=set[Waker])
    notified_at: float = float("-inf")
    asked: Question | None = None


class _ReceiverError(Exception):
    """The receiver did not answer as it should. The message follows the words "The webhook receiver"."""


async def _ask(client: httpx.AsyncClient, url: str, field: str, kind: type, **params: str) -> Mapping[str, Any]:
    """Return the receiver's answer, which has a field of a kind."""
    try:
        answer = await client.get(url, params=params)
    except (*HTTP_ERRORS, httpx.InvalidURL) as error:
        raise _ReceiverError(f"does not answer at {url} ({type(error).__name__})") from error
    if not answer.is_success:
        raise _ReceiverError(f"answers HTTP {answer.status_code} to GET {url}")
    try:
        body = as_object(answer.json())
    except (ValueError, RecursionError):
        body = {}
    if not isinstance(body.get(field), kind):
        raise _ReceiverError(f"answers GET {url} with something else than webhooks")
    return body


class _Hub:
    """Reads the receiver's webhooks in a thread of its own, since waiters are on many event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._receiver: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient, str] | None = None  # if it answers
        self._trouble: str | None = None
        self._warned: set[str | None] = set()

    def warn_of_trouble(self) -> None:
        """Say in the log of the flow run around this call, once, that no webhook reaches this process."""
        trouble, own = self._trouble, flow_run_id()
        if trouble is None or own in self._warned:
            return
        self._warned.add(own)
        run_logger().warning("%s Runs are polled as without webhooks.", trouble)

    def start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                # Prefect's settings are context variables, which a thread does not get by itself.
                context = contextvars.copy_context()
                self._thread = threading.Thread(
                    target=lambda: context.run(asyncio.run, self._listen()), name="prefect-crew-listener", daemon=True
                )
                self._thread.start()

    def _run(self, idempotency_key: str) -> _Run:
        run = self._runs.setdefault(idempotency_key, _Run())
        self._runs.move_to_end(idempotency_key)
        if len(self._runs) > MOST_KEPT:
            oldest = next((key for key, other in self._runs.items() if not other.wakers), None)
            if oldest is not None:
                del self._runs[oldest]
        return run

    def add(self, idempotency_key: str, waker: Waker) -> None:
        with self._lock:
            run = self._run(idempotency_key)
            run.wakers.add(waker)
            notified_at, question = run.notified_at, run.asked
        if time.monotonic() - notified_at < KEPT:
            waker.wake(question)

    def remove(self, idempotency_key: str, waker: Waker) -> None:
        with self._lock:
            run = self._run(idempotency_key)
            run.wakers.discard(waker)
            if not run.wakers:
                del self._runs[idempotency_key]

    async def tokens(self, run: str) -> Mapping[str, Any]:
        """Return the tokens of a run as the receiver has counted them; nothing if it does not answer."""
        if self._receiver is None:
            return {}
        loop, client, url = self._receiver
        try:
            asking = asyncio.run_coroutine_threadsafe(_ask(client, url, "models", dict, run=run), loop)
            return await asyncio.wait_for(asyncio.wrap_future(asking), TOKENS_WITHIN)
        except Exception:  # noqa: BLE001  the tokens are then unknown, and the end of the run is not lost
            return {}

    async def _listen(self) -> None:
        try:
            place = latest_webhooks_of(CrewSettings())
            if place is not None:
                await self._ask_receiver(*place)
        except ConfigurationError as error:
            self._trouble = str(error)

    async def _ask_receiver(self, url: str, token: str) -> None:
        """Ask the receiver for the latest webhooks, again and again."""
        cursor, failures = "", 0
        # A token does not go through a proxy in clear text.
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"}, timeout=ANSWER_WITHIN, trust_env=url.startswith("https:")
        ) as client:
            while True:
                try:
                    body = await _ask(client, url, "cursor", str, after=cursor)
                except _ReceiverError as error:
                    self._receiver, failures = None, failures + 1
                    if failures > 1:  # a receiver that is started again is back by then
                        self._trouble = f"The webhook receiver {error}."
                    await asyncio.sleep(AWAY[min(failures, len(AWAY)) - 1])
                    continue
                cursor, failures = body["cursor"], 0
                self._receiver, self._trouble = (asyncio.get_running_loop(), client, url), None
                self._warned.clear()
                for webhook in as_list(body.get("webhooks")):
                    self._hear(as_object(webhook))
                if body.get("missed") is True:
                    # Several receivers share one address, and none has the cursor of another.
                    await asyncio.sleep(AWAY[-1])

    def _hear(self, event: Mapping[str, Any]) -> None:
        """Wake the waiters of the run that a webhook is about, once."""
        id_, name, idempotency_key = event.get("id"), event.get("event"), event.get("idempotency_key")
        if not (isinstance(id_, str) and isinstance(name, str) and isinstance(idempotency_key, str)):
            return
        attempt, answers = event.get("attempt"), event.get("round")
        question: Question | None = None
        if name == ASKED and isinstance(attempt, int) and isinstance(answers, int):
            question = attempt, answers
        with self._lock:
            if id_ in self._heard:
                return
            self._heard[id_] = None
            if len(self._heard) > MOST_KEPT:
                self._heard.popitem(last=False)
            run = self._run(idempotency_key)
            run.notified_at, run.asked = time.monotonic(), question or run.asked
            wakers = list(run.wakers)
        for waker in wakers:
            waker.wake(question)


_hub = _Hub()  # Process-wide: one connection serves the waiters of all event loops.


def subscribe() -> None:
    """Begin to listen. Call it before a kickoff with webhooks, or the webhook of a very fast crew may be missed."""
    _hub.start()


@asynccontextmanager
async def waker_for(record: RunRecord) -> AsyncGenerator[Waker | None]:
    """Yield a `Waker`, by which webhooks wake a run's wait; None for a run without webhooks to a receiver of ours."""
    settings = CrewSettings()
    if not record.has_webhooks or not settings.webhook_url or is_prefect_cloud(settings.webhook_url):
        yield None
        return
    _hub.start()
    key = record.idempotency_key
    waker = Waker(_hub, run_name(key, record.attempt, claim_of(record.owner)), calls=settings.webhook_llm_calls)
    _hub.add(key, waker)
    try:
        yield waker
    finally:
        _hub.remove(key, waker)
