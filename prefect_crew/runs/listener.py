"""End the pauses of waits early, when a webhook has come: one listener a process, however many runs it waits for.

It asks the receiver itself, which answers within milliseconds. It also reads Prefect's events, which take a second: an
answer that somebody else has given is only there, and so is all that Prefect Cloud's own receiver takes. A webhook
proves nothing and may never come, so the status call goes on being made, only more rarely, and as often as without
webhooks once the receiver was found not to answer.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import httpx
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from websockets.exceptions import WebSocketException

from prefect_crew._internal.prefect_errors import HTTP_ERRORS
from prefect_crew._text import one_line
from prefect_crew.client._parsing import as_list, as_object, tokens_of
from prefect_crew.client.models import CrewStatus, TokenUsage
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.webhooks import ASKED, CALLED, COMPLETED, WAKING, latest_webhooks_of

ANSWERED = "crew.reviewed"
KEY_LABEL = "prefect-crew.idempotency-key"
SAFETY = (15.0, 30.0, 60.0)
"""Seconds between two looks while webhooks are trusted: the first, the second, all further ones."""
AFTER_WAKE = 0.5
"""Seconds between the look that a webhook caused and the next one, if it showed nothing new; then twice as many each. A
webhook may come before the status shows what it is about."""
DISTRUST = 600.0
"""Seconds for which the receiver is not relied on after a run was found changed that no webhook had reported."""
KEPT = 300.0  # seconds for which an event is remembered for a waiter that begins to wait after it
MOST_KEPT = 10_000  # runs of which events are remembered
RECONNECT = 5.0
ANSWER_WITHIN = 30.0  # seconds for an answer of the receiver, which holds it back for ten while there is nothing to say
USAGE_WITHIN = 0.5
"""Seconds for which the end of a run waits for the webhooks that may tell its tokens, where its status does not."""
SILENT = 600.0
"""Seconds for which nothing waits for them any more after they were waited for in vain, by crew."""
_TELLING = {COMPLETED, "crew.webhook.stream.crew_kickoff_completed"}
"""The webhooks of a completed run that may tell its tokens."""
Question = tuple[int, int]  # the attempt at the idempotency key, and how many answers of people came before, modulo 256


class Waker:
    """Ends the pauses of one waiter. Of the event loop that made it."""

    def __init__(self, hub: _Hub, idempotency_key: str, crew: str, *, calls: bool = False) -> None:
        self._hub = hub
        self._idempotency_key = idempotency_key
        self._crew = crew
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._has_ended = False
        self._looks = 0
        self._next_soon = math.inf
        self._was_soon = False
        self._asked: set[Question] = set()
        self.woken = False

    def wake(self, asked: Question | None = None, *, ends_pause: bool = True) -> None:
        """Tell of a webhook; from any thread. `asked`: what a person is asked, if that is what it says."""
        if asked is not None:
            self._asked.add(asked)
        if ends_pause or self._has_ended:
            with suppress(RuntimeError):  # the loop of a waiter that has just left is closed
                self._loop.call_soon_threadsafe(self._event.set)

    def has_question_after(self, attempt: int, answers: int) -> bool:
        """Return whether a webhook reported a question that came after so many answers of people in this attempt.

        Each answer brings new URLs, which hold how many there were: so this is not a late delivery of the question
        before.
        """
        return (attempt, answers % 256) in self._asked

    async def with_usage(self, status: CrewStatus) -> CrewStatus:
        """Return the status of an ended run with the tokens that webhooks reported, where it has none itself.

        They are waited for a moment, while one of them is still to come that may tell.
        """
        if not status.state.ended:
            return status
        self._has_ended = True
        try:
            async with asyncio.timeout(USAGE_WITHIN):
                while self._may_hear_more(status):
                    await self._event.wait()
                    self._event.clear()
        except TimeoutError:
            self._hub.note_silent(self._crew)
        tokens = self._hub.tokens(self._idempotency_key, status.kickoff_id)
        return status.model_copy(update={"usage": status.usage or tokens.usage, "usage_by_model": tokens.models})

    def _may_hear_more(self, status: CrewStatus) -> bool:
        """Return whether a webhook may still tell the tokens of an ended run."""
        tokens = self._hub.tokens(self._idempotency_key, status.kickoff_id)
        if status.usage or not self._hub.may_hear_of(self._crew):
            return False
        if self._calls:
            return status.state is not CrewState.STOPPED and not tokens.has_all_calls
        return status.state is CrewState.COMPLETED and not (tokens.usage or tokens.heard >= _TELLING)

    def stretch(self, delay: float) -> float:
        """Return the pause before the next look, in seconds: a long one while a webhook is sure to end it."""
        if not self._hub.trusted:
            return delay
        soon, self._next_soon = self._next_soon, 2 * self._next_soon
        self._was_soon = soon < SAFETY[0]
        if self._was_soon:
            return soon
        longer = SAFETY[min(self._looks, len(SAFETY) - 1)]
        self._looks += 1
        return max(delay, longer)

    async def pause(self, seconds: float) -> None:
        """Sleep, until something has happened at the most."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
            self.woken, self._next_soon = True, AFTER_WAKE
        except TimeoutError:
            self.woken = False
        self._event.clear()

    def note_missed(self) -> None:
        """Note that a run was found changed, which a webhook should have reported."""
        if not self.woken and not self._was_soon:
            self._hub.distrust()


@dataclass
class _Tokens:
    """What webhooks reported of the tokens of one run: in all, by its crews, by the models that were called.

    The crew's own webhook has those of the whole run. An event of the stream has those of one crew, of which a Flow may
    run several, or of one call of a model.
    """

    whole: TokenUsage | None = None
    crews: TokenUsage | None = None
    models: dict[str, TokenUsage] = field(default_factory=dict[str, TokenUsage])
    heard: set[str] = field(default_factory=set[str])
    """The names of the webhooks."""

    @property
    def usage(self) -> TokenUsage | None:
        """The one that says most: calls tell what went in and out, yet some of them may be missing."""
        told = self.whole or self.crews
        if told is not None and (told.prompt_tokens is not None or not self.has_all_calls):
            return told
        return TokenUsage.sum(self.models.values())

    @property
    def has_all_calls(self) -> bool:
        """Whether the calls of models come to as much as is known in all."""
        told, called = self.whole or self.crews or TokenUsage(), TokenUsage.sum(self.models.values())
        return called is not None and (called.total_tokens or 0) >= (told.total_tokens or 0)

    def add(self, name: str, said: Mapping[str, Any]) -> None:
        """Take up a webhook, once."""
        self.heard.add(name)
        usage, model = tokens_of(said), said.get("model")
        if name == COMPLETED:
            self.whole = usage or self.whole
        elif usage is not None and name != CALLED:
            self.crews = TokenUsage.sum(filter(None, [self.crews, usage]))
        elif usage is not None and isinstance(model, str) and (model in self.models or len(self.models) < 100):
            known = TokenUsage.sum(filter(None, [self.models.get(model), usage]))
            self.models[model] = known or usage


@dataclass
class _Run:
    """What webhooks reported about the runs of one key. `tokens` by kickoff id."""

    wakers: set[Waker] = field(default_factory=set[Waker])
    notified_at: float = float("-inf")
    asked: Question | None = None
    tokens: dict[str, _Tokens] = field(default_factory=dict[str, _Tokens])


class _Hub:
    """The subscription, in a thread of its own since waiters come from many event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._has_events = False
        self._has_receiver = False
        self._was_refused = False
        self._distrusted_until = 0.0
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._silent_until: dict[str, float] = {}  # by the address of a crew

    @property
    def is_connected(self) -> bool:
        """Whether webhooks reach this process, as far as is known."""
        return self._has_events or self._has_receiver

    @property
    def trusted(self) -> bool:
        """Whether webhooks reach this process, and none was found to be missing lately."""
        return self.is_connected and time.monotonic() >= self._distrusted_until

    def distrust(self) -> None:
        self._distrusted_until = time.monotonic() + DISTRUST

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
            oldest = next((key for key, one in self._runs.items() if not one.wakers), None)
            if oldest is not None:
                del self._runs[oldest]
        return run

    def add(self, idempotency_key: str, waker: Waker) -> None:
        with self._lock:
            run = self._run(idempotency_key)
            run.wakers.add(waker)
            notified_at, asked = run.notified_at, run.asked
        if time.monotonic() - notified_at < KEPT:
            waker.wake(asked)

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
        """Return whether webhooks reach this process, and those about a crew's runs tell tokens, as far as is known."""
        return self.is_connected and time.monotonic() >= self._silent_until.get(crew, 0.0)

    def note_silent(self, crew: str) -> None:
        """Note that the tokens of a crew's run were waited for in vain."""
        self._silent_until[crew] = time.monotonic() + SILENT

    async def _listen(self) -> None:
        try:
            await asyncio.gather(self._read_events(), self._ask_receiver())
        finally:
            self._has_events = self._has_receiver = False

    async def _ask_receiver(self) -> None:
        """Ask the receiver for the latest webhooks, again and again. One that is away is no fault: there are Prefect's
        events, and polling."""
        try:
            place = latest_webhooks_of(CrewSettings())
        except ConfigurationError as error:
            logging.getLogger("prefect_crew").warning("%s Waits poll as without webhooks.", error)
            return
        if place is None:
            return
        (url, token), cursor = place, ""
        # A token does not go through a proxy in clear text.
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"}, timeout=ANSWER_WITHIN, trust_env=url.startswith("https:")
        ) as client:
            while True:
                try:
                    answer = await client.get(url, params={"after": cursor})
                    body = as_object(answer.json()) if answer.is_success else {}
                except (*HTTP_ERRORS, httpx.InvalidURL, ValueError, RecursionError):
                    body = {}  # nothing that a receiver would say
                webhooks, found = as_list(body.get("webhooks")), body.get("cursor")
                for webhook in webhooks:
                    self._hear(as_object(webhook))
                # Where several receivers share the webhooks, or one of them has just started, some may have gone
                # elsewhere.
                self._has_receiver = isinstance(found, str) and body.get("missed") is not True
                cursor = found if isinstance(found, str) else cursor
                if not self._has_receiver:
                    await asyncio.sleep(RECONNECT)

    async def _read_events(self) -> None:
        names = EventFilter(event=EventNameFilter(name=[*WAKING, ANSWERED]))
        while True:
            try:
                async with get_events_subscriber(filter=names, reconnection_attempts=0) as events:
                    self._has_events, self._was_refused = True, False
                    async for event in events:
                        key = event.resource.get(KEY_LABEL)
                        known = {"id": str(event.id), "event": event.event, "idempotency_key": key}
                        self._hear({**event.payload, **known})
            except (*HTTP_ERRORS, WebSocketException, OSError, ValueError):
                pass  # away: the waiters look by themselves until it is back
            except Exception as error:
                if type(error) is not Exception:
                    raise
                # Prefect's subscriber raises a plain Exception where its server refuses the credentials.
                if not self._was_refused:
                    logging.getLogger("prefect_crew").warning(
                        "Webhooks do not shorten waits in this process: %s", one_line(str(error))
                    )
                self._was_refused = True
            self._has_events = False
            await asyncio.sleep(RECONNECT)

    def _hear(self, event: Mapping[str, Any]) -> None:
        """Wake the waiters of the run that an event is about, once: most come from the receiver and from Prefect."""
        id_, name, idempotency_key = event.get("id"), event.get("event"), event.get("idempotency_key")
        if not (isinstance(id_, str) and isinstance(name, str) and isinstance(idempotency_key, str)):
            return
        said, attempt, answers = as_object(event.get("said")), event.get("attempt"), event.get("round")
        asked: Question | None = None
        if name == ASKED and isinstance(attempt, int) and isinstance(answers, int):
            asked = attempt, answers
        with self._lock:
            if id_ in self._heard:
                return
            self._heard[id_] = None
            if len(self._heard) > MOST_KEPT:
                self._heard.popitem(last=False)
            run, kickoff_id = self._run(idempotency_key), said.get("kickoff_id")
            if isinstance(kickoff_id, str) and (kickoff_id in run.tokens or len(run.tokens) < 100):
                run.tokens.setdefault(kickoff_id, _Tokens()).add(name, said)
            wakers = list(run.wakers)
            if name != CALLED:
                run.notified_at, run.asked = time.monotonic(), asked or run.asked
                if name != ANSWERED:  # webhooks do come
                    self._distrusted_until = 0.0
        for waker in wakers:
            waker.wake(asked, ends_pause=name != CALLED)


_hub = _Hub()  # Process-wide: one subscription serves the waiters of all event loops.


def subscribe() -> None:
    """Begin to listen: before a kickoff with webhooks, so that not even an instant crew's is missed."""
    _hub.start()


@asynccontextmanager
async def waker_for(idempotency_key: str, crew: str) -> AsyncGenerator[Waker | None]:
    """Give a waker for a run's waiter; None where webhooks are off. `crew` is its address."""
    if not (settings := CrewSettings()).webhook_url:
        yield None
        return
    _hub.start()
    waker = Waker(_hub, idempotency_key, crew, calls=settings.webhook_llm_calls)
    _hub.add(idempotency_key, waker)
    try:
        yield waker
    finally:
        _hub.remove(idempotency_key, waker)
