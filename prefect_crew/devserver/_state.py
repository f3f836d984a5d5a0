"""What one dev server holds: its crews with all their runs, its token, faults and counters."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from prefect_crew.devserver._faults import Faults
from prefect_crew.devserver._response_formats import ResponseFormat
from prefect_crew.devserver._runs import CrewRuns, Run
from prefect_crew.devserver._webhooks import WebhookSender

CRASH_EXIT_CODE = 86
"""What the process of `serve` exits with when the fault `crash` ends it."""


@dataclass
class Counters:
    """What a server was asked, over its whole life, restarts included.

    Attributes:
        requests: Requests by place (inputs, kickoff, status, resume, stop, health), answered or not.
        answers: Answers by place and HTTP status; a dropped request has none.
        unauthorized: Requests with a missing or wrong token; they count nowhere else.
        accepted: The kickoffs that started a run: kickoff id to meta.
    """

    requests: Counter[str] = field(default_factory=Counter[str])
    answers: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    unauthorized: int = 0
    accepted: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def kickoffs(self) -> int:
        """Kickoffs that started a run."""
        return len(self.accepted)

    @property
    def kickoffs_by_key(self) -> Counter[str]:
        """Kickoffs that started a run, by the `idempotency_key` in their meta."""
        metas = [cast("dict[str, Any]", meta) for meta in list(self.accepted.values()) if isinstance(meta, dict)]
        return Counter(str(meta["idempotency_key"]) for meta in metas if "idempotency_key" in meta)


def end_process() -> None:
    """End this process at once, as a crash would: no clean-up, no flush."""
    os._exit(CRASH_EXIT_CODE)


@dataclass
class ServerState:
    """What one server holds.

    Attributes:
        token: The bearer token that requests must carry; it may be replaced while the server runs.
        crews: The runs of each crew, by the name it is mounted at; "" for the only one.
        crash: What the fault `crash` does.
        closing: Set when the server shuts down, so that requests which never answer end.
    """

    token: str = field(repr=False)
    response_format: ResponseFormat
    faults: Faults
    sender: WebhookSender
    crews: dict[str, CrewRuns]
    counters: Counters = field(default_factory=Counters)
    crash: Callable[[], None] = end_process
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> list[Run]:
        """All runs of all crews, oldest first for each crew."""
        return [run for runs in self.crews.values() for run in runs]

    def open(self) -> None:
        """Begin to run, on this event loop, for the first time or again; see `CrewRuns.open`."""
        self.closing = asyncio.Event()
        self.sender.open()
        for runs in self.crews.values():
            runs.open()

    def abandon(self) -> None:
        """End as a crash would: from now on nothing is sent or finished."""
        self.closing.set()
        for runs in self.crews.values():
            runs.abandon()
        self.sender.abandon()

    async def close(self) -> None:
        """Cancel the runs in flight and the requests that hang, and wait for their end."""
        self.abandon()
        for runs in self.crews.values():
            await runs.close()
        await self.sender.close()
