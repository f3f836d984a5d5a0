"""End the pauses of waits early when a webhook comes. A process has one listener for all its runs.

The listener asks the receiver, which answers within milliseconds. A webhook proves nothing and may never come: it only
brings the next status call forward. Polls go on as the policy says, so no end is seen later than without webhooks.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import httpx

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import HTTP_ERRORS
from prefect_crew.client._parsing import as_list, as_object, tokens_of
from prefect_crew.client.models import CrewStatus, TokenUsage
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.webhooks import ASKED, COMPLETED, is_prefect_cloud, latest_webhooks_of

KEPT = 300.0  # seconds for which a webhook is remembered for a waiter that begins to wait after it
MOST_KEPT = 10_000  # runs of which webhooks are remembered
AWAY = (1.0, 2.0, 5.0)
"""Seconds before the receiver is asked again, after each failure in a row; the last one for all further failures."""
ANSWER_WITHIN = 30.0  # seconds for an answer of the receiver, which holds it back for ten while there is nothing to say
USAGE_WITHIN = 0.5
"""Seconds for which the end of a run waits for a webhook with its tokens, if its status has none."""
SILENT = 600.0
"""Seconds after a wait for tokens in vain, within which no run of the same crew waits for them."""
_TELLING = {COMPLETED, "crew.webhook.stream.crew_kickoff_completed"}
"""The webhooks of a completed run that may have its tokens."""
Question = tuple[int, int]  # the attempt at the idempotency key, and how many answers of people came before, modulo 256


class Waker:
    """Ends the pauses of one waiter, on the event loop that made it."""

    def __init__(self, hub: _Hub, idempotency_key: str, crew: str) -> None:
        self._hub = hub
        self._idempotency_key = idempotency_key
        self._crew = crew
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

    async def with_usage(self, status: CrewStatus, kickoff_id: str) -> CrewStatus:
        """Return the status of an ended run, with the tokens that webhooks reported if it has none of its own.

        `kickoff_id` is the id by which the webhooks name the run. If a webhook with tokens may still come, this waits
        for a moment.
        """
        if not status.state.ended:
            return status
        try:
            async with asyncio.timeout(USAGE_WITHIN):
                while self._may_hear_more(status, kickoff_id):
                    await self._event.wait()
                    self._event.clear()
        except TimeoutError:
            self._hub.note_silent(self._crew)
        tokens = self._hub.tokens(self._idempotency_key, kickoff_id)
        return status.model_copy(update={"usage": status.usage or tokens.usage})

    def _may_hear_more(self, status: CrewStatus, kickoff_id: str) -> bool:
        """Return whether a webhook with the tokens of an ended run may still come."""
        tokens = self._hub.tokens(self._idempotency_key, kickoff_id)
        if status.usage or not self._hub.may_hear_of(self._crew):
            return False
        return status.state is CrewState.COMPLETED and not (tokens.usage or tokens.heard >= _TELLING)

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
class _Tokens:
    """The tokens of one run in its webhooks: of the whole run, and of its crews, of which a Flow may run several."""

    whole: TokenUsage | None = None
    crews: TokenUsage | None = None
    heard: set[str] = field(default_factory=set[str])
    """The names of the webhooks."""

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens of the whole run, else those of its crews together; None if no webhook reported any."""
        return self.whole or self.crews

    def add(self, name: str, body: Mapping[str, Any]) -> None:
        """Add the tokens of a webhook. Call this once for each webhook."""
        self.heard.add(name)
        usage = tokens_of(body)
        if name == COMPLETED:
            self.whole = usage or self.whole
        elif usage is not None:
            self.crews = TokenUsage.sum(filter(None, [self.crews, usage]))


@dataclass
class _Run:
    """The webhooks about the runs of one key. `tokens` by kickoff id."""

    wakers: set[Waker] = field(default_factory=set[Waker])
    notified_at: float = float("-inf")
    asked: Question | None = None
    tokens: dict[str, _Tokens] = field(default_factory=dict[str, _Tokens])


class _ReceiverError(Exception):
    """The receiver did not return its webhooks. The message follows the words "The webhook receiver"."""


async def _ask(client: httpx.AsyncClient, url: str, cursor: str) -> dict[str, Any]:
    """Return the receiver's answer: the webhooks after a cursor, and the cursor after them."""
    try:
        answer = await client.get(url, params={"after": cursor})
        body = as_object(answer.json()) if answer.is_success else {}
    except (*HTTP_ERRORS, httpx.InvalidURL) as error:
        raise _ReceiverError(f"does not answer at {url} ({type(error).__name__})") from error
    except (ValueError, RecursionError):
        answer, body = None, {}
    if answer is not None and not answer.is_success:
        raise _ReceiverError(f"answers HTTP {answer.status_code} to GET {url}")
    if not isinstance(body.get("cursor"), str):
        raise _ReceiverError(f"answers GET {url} with something else than webhooks")
    return {**body}


class _Hub:
    """Reads the receiver's webhooks in a thread of its own, since waiters are on many event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._silent_until: dict[str, float] = {}  # by the address of a crew
        self._has_receiver = False
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

    def tokens(self, idempotency_key: str, kickoff_id: str) -> _Tokens:
        """Return the tokens of a run as far as webhooks have reported them."""
        with self._lock:
            return deepcopy(self._run(idempotency_key).tokens.get(kickoff_id, _Tokens()))

    def may_hear_of(self, crew: str) -> bool:
        """Return whether webhooks reach this process, and may have the tokens of a crew's runs."""
        return self._has_receiver and time.monotonic() >= self._silent_until.get(crew, 0.0)

    def note_silent(self, crew: str) -> None:
        """Note that a wait for the tokens of a crew's run was in vain."""
        self._silent_until[crew] = time.monotonic() + SILENT

    async def _listen(self) -> None:
        try:
            place = latest_webhooks_of(CrewSettings())
            if place is not None:
                await self._ask_receiver(*place)
        except ConfigurationError as error:
            self._trouble = str(error)
        finally:
            self._has_receiver = False

    async def _ask_receiver(self, url: str, token: str) -> None:
        """Ask the receiver for the latest webhooks, again and again."""
        cursor, failures = "", 0
        # A token does not go through a proxy in clear text.
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"}, timeout=ANSWER_WITHIN, trust_env=url.startswith("https:")
        ) as client:
            while True:
                try:
                    body = await _ask(client, url, cursor)
                except _ReceiverError as error:
                    self._has_receiver, failures = False, failures + 1
                    if failures > 1:  # a receiver that is started again is back by then
                        self._trouble = f"The webhook receiver {error}."
                    await asyncio.sleep(AWAY[min(failures, len(AWAY)) - 1])
                    continue
                cursor, failures = body["cursor"], 0
                self._has_receiver, self._trouble = True, None
                self._warned.clear()
                for webhook in as_list(body.get("webhooks")):
                    self._hear(as_object(webhook))
                if body.get("missed") is True:
                    # Several receivers share one address, and none has the cursor of another.
                    await asyncio.sleep(AWAY[-1])

    def _hear(self, event: Mapping[str, Any]) -> None:
        """Wake the waiters of the run that a webhook is about. A second delivery of the same webhook wakes nobody."""
        id_, name, idempotency_key = event.get("id"), event.get("event"), event.get("idempotency_key")
        if not (isinstance(id_, str) and isinstance(name, str) and isinstance(idempotency_key, str)):
            return
        body, attempt, answers = as_object(event.get("said")), event.get("attempt"), event.get("round")
        question: Question | None = None
        if name == ASKED and isinstance(attempt, int) and isinstance(answers, int):
            question = attempt, answers
        with self._lock:
            if id_ in self._heard:
                return
            self._heard[id_] = None
            if len(self._heard) > MOST_KEPT:
                self._heard.popitem(last=False)
            run, kickoff_id = self._run(idempotency_key), body.get("kickoff_id")
            if isinstance(kickoff_id, str) and (kickoff_id in run.tokens or len(run.tokens) < 100):
                run.tokens.setdefault(kickoff_id, _Tokens()).add(name, body)
            wakers = list(run.wakers)
            run.notified_at, run.asked = time.monotonic(), question or run.asked
        for waker in wakers:
            waker.wake(question)


_hub = _Hub()  # Process-wide: one connection serves the waiters of all event loops.


def subscribe() -> None:
    """Begin to listen. Call it before a kickoff with webhooks, or the webhook of a very fast crew may be missed."""
    _hub.start()


@asynccontextmanager
async def waker_for(idempotency_key: str, crew: str) -> AsyncGenerator[Waker | None]:
    """Yield a `Waker`, by which webhooks wake a run's wait; None without a receiver of ours. `crew`: the crew's URL."""
    settings = CrewSettings()
    if not settings.webhook_url or is_prefect_cloud(settings.webhook_url):
        yield None
        return
    _hub.start()
    waker = Waker(_hub, idempotency_key, crew)
    _hub.add(idempotency_key, waker)
    try:
        yield waker
    finally:
        _hub.remove(idempotency_key, waker)
