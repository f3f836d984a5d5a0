"""What one running app shares: the token, the crews, the faults, the counters.

Split from `app`, so that the fault layer and the servers can use it without knowing the endpoints.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from prefect_crew.server.dialects import Dialect
from prefect_crew.server.execution import Execution
from prefect_crew.server.executions import Executions
from prefect_crew.server.faults import Faults
from prefect_crew.server.journal import Journal
from prefect_crew.server.webhooks import WebhookSender

__all__ = ["CRASH_EXIT_CODE", "RUN_KEY", "Counters", "Runtime"]

CRASH_EXIT_CODE = 86
"""What the process of `serve` exits with when the fault `crash` ends it."""

RUN_KEY = "run_key"
"""The key of `meta` under which kickoffs are counted by run."""


@dataclass
class Counters:
    """What a server was asked, counted over its whole life, restarts included.

    Attributes:
        requests: Requests by place (inputs, kickoff, status, resume, stop, health), answered or not.
        answers: Answers by place and HTTP status; a dropped request has none.
        unauthorized: Requests with a missing or wrong token; they count nowhere else.
        accepted: All accepted kickoffs: id to meta.
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
    def kickoffs_by_run_key(self) -> Counter[str]:
        """Kickoffs that started a run, by the run key in their meta."""
        maps = [cast("dict[str, Any]", meta) for meta in list(self.accepted.values()) if isinstance(meta, dict)]
        return Counter(str(meta[RUN_KEY]) for meta in maps if RUN_KEY in meta)


def die() -> None:
    """End this process at once, as a crash would: no clean-up, no flush, no goodbye."""
    os._exit(CRASH_EXIT_CODE)


@dataclass
class Runtime:
    """One running app.

    Attributes:
        token: The bearer token that requests must carry; may be replaced while the app runs.
        crews: The runs of each crew, by the path it is mounted at; "" for the only one.
        crash: What the fault `crash` does.
        closing: Set when the app shuts down, so that requests which never answer let go.
    """

    token: str = field(repr=False)
    dialect: Dialect
    faults: Faults
    counters: Counters
    sender: WebhookSender
    crews: dict[str, Executions]
    journal: Journal | None = None
    crash: Callable[[], None] = die
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> list[Execution]:
        """All runs of all crews, oldest first for each crew."""
        return [run for executions in self.crews.values() for run in executions]

    async def start(self) -> None:
        """Take up what the journal knows."""
        for executions in self.crews.values():
            executions.recover()
        for run in self.runs:
            self.counters.accepted.setdefault(run.id, run.meta)

    def abandon(self) -> None:
        """End as a crash would: from now on nothing is written, sent or finished."""
        for executions in self.crews.values():
            executions.abandon()
        self.sender.abandon()

    async def close(self) -> None:
        """Cancel the runs in flight and what hangs; idempotent."""
        self.closing.set()
        for executions in self.crews.values():
            await executions.close()
        await self.sender.close()
