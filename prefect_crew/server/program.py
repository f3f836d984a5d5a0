"""What the local crew server runs: the seam between the HTTP side and scripted or real crews.

A `Program` is a crew as the server sees it; a `Run` is one kickoff of it, the program's only way to tell the server
(and so its clients) what happens. Programs know nothing of HTTP, dialects, webhooks or faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefect_crew.api.models import CrewInput, TaskResult, TokenUsage

__all__ = ["Answer", "Outcome", "Program", "ProgramError", "ProgramNotFoundError", "Run"]


class ProgramError(Exception):
    """The crew failed; the text is what its status answer will say."""


class ProgramNotFoundError(ValueError):
    """What was asked for cannot be served; the text says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """What a person answered through `/resume`."""

    approve: bool
    feedback: str


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the text, the structured result where there is one, usage where it is known."""

    output: str
    data: Any = None
    usage: TokenUsage | None = None
    tasks: list[TaskResult] = field(default_factory=list[TaskResult])
    """All tasks, where the program knows them better than its `task_ended` calls told. Empty: those count."""


class Run(Protocol):
    """One kickoff. Its methods must be called on the server's event loop unless they say otherwise."""

    @property
    def id(self) -> str:
        """The kickoff id."""
        ...

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the kickoff gave."""
        ...

    @property
    def restore_from(self) -> str | None:
        """The state that a Flow is to start from, as the kickoff's `restoreFromStateId` names it."""
        ...

    @property
    def stop_requested(self) -> bool:
        """True once `/stop` was accepted. Safe to read from any thread."""
        ...

    def plan(self, tasks: list[str]) -> None:
        """Name the tasks that are to come, so that progress has a total."""
        ...

    def task_started(self, name: str, *, agent: str | None = None, description: str | None = None) -> None:
        """Say that a task begins."""
        ...

    def task_ended(self, task: TaskResult) -> None:
        """Say what a task gave."""
        ...

    def step(self, *, agent: str | None, kind: str, content: str, tool: str | None = None) -> None:
        """Say what an agent did."""
        ...

    async def ask(self, *, task_id: str, output: str) -> Answer:
        """Wait for a person: the state becomes "waits for a person" until `/resume` answers."""
        ...


class Program(Protocol):
    """A crew that can be run many times at once. One that is a Flow says so by an attribute `flow` that is true."""

    @property
    def name(self) -> str:
        """The crew's name."""
        ...

    def inputs(self) -> list[CrewInput]:
        """Return what `GET /inputs` says. Called for each request, so it must be cheap."""
        ...

    async def execute(self, run: Run) -> Outcome:
        """Run the crew once.

        It is cancelled (asyncio.CancelledError) when the run is stopped, and must not block the event loop.

        Raises:
            ProgramError: The crew failed.
        """
        ...
