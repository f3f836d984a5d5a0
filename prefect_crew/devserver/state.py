"""What one dev server holds: its crews, all their runs, its token, faults and counters."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from prefect_crew.devserver.faults import Faults
from prefect_crew.devserver.response_formats import Dialect
from prefect_crew.devserver.runs import Execution, Hooks, Journal, Listener, Outcome, Program, ProgramError, nobody
from prefect_crew.devserver.webhooks import WebhookSender
from prefect_crew.states import CrewState


class StoppedTooLateError(Exception):
    """The run has already ended."""


class Executions:
    """All runs of one program.

    Args:
        program: The crew.
        name: What tells its runs from others in the journal; the program's name by default.
        max_runs: At most this many run at once; later ones are pending. None: no limit.
        journal: Where to remember them, so that `recover` finds them again.
        on_crash: What becomes of runs that were in flight when the journal ends: "rerun" starts them again under
            their ids, "lose" forgets them.
        new_id: Makes the id of a run; a UUID by default.
    """

    def __init__(
        self,
        program: Program,
        *,
        name: str = "",
        listener: Listener = nobody,
        max_runs: int | None = None,
        journal: Journal | None = None,
        on_crash: Literal["rerun", "lose"] = "rerun",
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.program = program
        self._name = name or program.name
        self._listener = listener
        self._gate = asyncio.Semaphore(max_runs) if max_runs else contextlib.nullcontext()
        self._journal = journal
        self._on_crash = on_crash
        self._new_id = new_id or _uuid
        self._runs: dict[str, Execution] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def __iter__(self) -> Iterator[Execution]:
        return iter(list(self._runs.values()))

    @property
    def flow(self) -> bool:
        """Whether the program is a Flow."""
        return getattr(self.program, "flow", False)

    def get(self, id: str) -> Execution | None:  # noqa: A002 - the crew API's word
        """Return the run, whatever its faults hide from clients, or None."""
        return self._runs.get(id)

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        meta: Any = None,
        hooks: Hooks | None = None,
        restore_from: str | None = None,
        stuck: bool = False,
    ) -> Execution:
        """Accept a run: it is in the journal when this returns, and runs by itself from then on."""
        execution = Execution(self._new_id(), inputs, meta=meta, hooks=hooks, restore_from=restore_from, flow=self.flow)
        execution.stuck = stuck
        if self._journal:
            self._journal.append(
                {
                    "event": "accepted",
                    "id": execution.id,
                    "crew": self._name,
                    "at": execution.created_at.isoformat(),
                    "inputs": dict(inputs),
                    "meta": meta,
                    "hooks": execution.hooks.as_body(),
                    "restore_from": restore_from,
                }
            )
        self._launch(execution)
        return execution

    def stop(self, execution: Execution) -> None:
        """Stop a run for good.

        Raises:
            StoppedTooLateError: It has already ended.
        """
        if execution.state.ended:
            raise StoppedTooLateError(execution.id)
        self._end(execution, "stopped", CrewState.STOPPED)
        if task := self._tasks.get(execution.id):
            task.cancel()

    def recover(self) -> None:
        """Read the journal: ended runs are known again, and those in flight start again, or are lost."""
        for entry in self._journal.read() if self._journal else []:
            if entry["event"] == "accepted" and entry["crew"] == self._name:
                hooks = Hooks.of(entry.get("hooks") or {})
                self._runs[entry["id"]] = Execution(
                    entry["id"],
                    entry["inputs"],
                    meta=entry.get("meta"),
                    hooks=hooks,
                    restore_from=entry.get("restore_from"),
                    flow=self.flow,
                )
            elif entry["event"] == "ended" and entry["id"] in self._runs:
                self._runs[entry["id"]].restore(entry)
        for execution in self:
            if execution.state.ended:
                continue
            if self._on_crash == "lose":
                execution.forgotten = True
            else:
                self._launch(execution)

    def abandon(self) -> None:
        """Cancel what runs, without a word to the journal: to it, this is as good as a crash."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        """Abandon what runs, and wait until it has ended."""
        self.abandon()
        tasks = list(self._tasks.values())
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._journal:
            self._journal.close()

    def _launch(self, execution: Execution) -> None:
        self._runs[execution.id] = execution
        task = asyncio.create_task(self._run(execution), name=f"crew run {execution.id}")
        self._tasks[execution.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(execution.id, None))

    async def _run(self, execution: Execution) -> None:
        try:
            async with self._gate:
                execution.begin(self._listener)
                if execution.stuck:
                    await asyncio.get_running_loop().create_future()
                outcome = await self.program.execute(execution)
        except asyncio.CancelledError:
            if self._closed or execution.stop_requested:
                raise
            self._end(execution, "failed", CrewState.FAILED, error="the crew was cancelled from within")
        except ProgramError as error:
            self._end(execution, "failed", CrewState.FAILED, error=str(error))
        # Whatever a crew raises is a failed run, never a broken server; sys.exit() would end the event loop.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._end(execution, "failed", CrewState.FAILED, error=f"{type(error).__name__}: {error}")
        else:
            self._end(execution, "completed", CrewState.COMPLETED, outcome=outcome)

    def _end(
        self,
        execution: Execution,
        what: str,
        state: CrewState,
        *,
        outcome: Outcome | None = None,
        error: str | None = None,
    ) -> None:
        if execution.state.ended or self._closed:
            return
        execution.end(state, outcome=outcome, error=error)
        if self._journal:
            self._journal.append(execution.as_entry())
        self._listener(execution, what, None)


def _uuid() -> str:
    return str(uuid.uuid4())


CRASH_EXIT_CODE = 86
"""What the process of `serve` exits with when the fault `crash` ends it."""

KEY = "idempotency_key"
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
    def kickoffs_by_key(self) -> Counter[str]:
        """Kickoffs that started a run, by the idempotency key in their meta."""
        maps = [cast("dict[str, Any]", meta) for meta in list(self.accepted.values()) if isinstance(meta, dict)]
        return Counter(str(meta[KEY]) for meta in maps if KEY in meta)


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
