"""The progress and the report of a batch: for code, as a line for people, and on its page in Prefect."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from prefect_crew._internal.prefect_api import flow_run_id
from prefect_crew._text import by_reason
from prefect_crew.artifacts.escape import cell, code, commands, duration, fenced, flow_run_link, link, prose, table
from prefect_crew.artifacts.run import MarkdownArtifact, artifact_key
from prefect_crew.batches.rows import BadRow, BadRows
from prefect_crew.client.models import TokenUsage
from prefect_crew.crew import Crew
from prefect_crew.exceptions import BatchFailedError
from prefect_crew.prices import Spending, money
from prefect_crew.runs.keys import escape_name
from prefect_crew.store.batches import CONFLICT
from prefect_crew.store.decision import AttemptState

FAILURES = 100
"""Failed rows that the artifact shows at most; the output has all."""
UNCERTAIN_KEYS = 1_000
FAILED = (AttemptState.FAILED, AttemptState.STOPPED, AttemptState.LOST)
"""The states of rows that have ended without a result."""
SHOW_EVERY = 5.0
"""Seconds, at least, between two updates of the artifact."""
WAITS_FOR_SLOT = "waiting for a free slot of the crew's concurrency limit"
BAR = 24


@dataclass(frozen=True, slots=True)
class RowEnd:
    """The end of a row in one call, with the class and the text of its error.

    `state`: that of its run, or "uncertain", "conflict", "invalid-output" (a result that does not fit `output_type`),
    "not-started" (its kickoff was refused) or "unfinished" (the wait for its run gave up). `is_new`: this call brought
    it about.
    """

    key: str
    state: str
    kind: str | None = None
    error: str | None = None
    kickoff_id: str | None = None
    is_new: bool = True

    @property
    def is_unfinished(self) -> bool:
        """Whether the next call goes on with the row by itself, although the run may be fine or nothing was started."""
        return self.state in ("unfinished", "not-started")


@dataclass(frozen=True)
class BatchReport:
    """The result of a batch, with all earlier calls of the same name.

    Attributes:
        name: The batch.
        total: All rows, bad ones too.
        completed, failed, uncertain: Rows in these states. A person has to resolve the uncertain ones.
        conflicts: The failed rows that have completed before with other inputs.
        unfinished: The failed rows that the next call continues: the wait for their runs gave up, or the crew's server
            refused their kickoffs.
        skipped: Rows that were not run: bad rows, rows left in flight, and rows not reached because the batch stopped.
        seconds: The wall time of this call.
        export: The address of the lines.
        stopped: The reason why the batch stopped, None if it did not stop.
        kickoffs: Runs that this call started.
        bad_count: Bad rows, which cannot be run. `bad`: the first 100 of them.
        uncertain_keys: The keys of the uncertain rows, up to 1,000.
        errors: Failures of this call by the class of their error.
        spending: Usage and cost of the runs of all calls, and the number of runs that reported usage and cost.
    """

    name: str
    total: int
    completed: int
    failed: int
    uncertain: int
    skipped: int
    seconds: float
    export: str
    stopped: str | None = None
    kickoffs: int = 0
    bad_count: int = 0
    bad: Sequence[BadRow] = ()
    uncertain_keys: Sequence[str] = ()
    errors: Mapping[str, int] = field(default_factory=dict[str, int])
    conflicts: int = 0
    unfinished: int = 0
    spending: Spending = field(default_factory=Spending)

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens that runs reported, None if no run did."""
        return self.spending.usage

    @property
    def cost(self) -> float | None:
        """The sum of the known costs, None if no cost is known."""
        return self.spending.cost

    @property
    def ok(self) -> bool:
        """Whether every row has completed."""
        return self.completed == self.total

    def raise_for_failures(self) -> None:
        """Raise BatchFailedError unless every row has completed."""
        if not self.ok:
            raise BatchFailedError(self)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**to_jsonable_python(asdict(self)), "spending": self.spending.as_dict()}

    def __str__(self) -> str:
        parts = [f"{self.completed:,} of {self.total:,} rows completed"]
        rest = (
            ("failed", self.failed),
            ("uncertain", self.uncertain),
            ("not run", self.skipped - self.bad_count),
            ("bad", self.bad_count),
        )
        parts += [f"{count:,} {word}" for word, count in rest if count]
        text = f"Batch {self.name}: {', '.join(parts)} in {duration(self.seconds)}. Export: {self.export}"
        if self.usage is not None or self.cost is not None:
            text += f". Used: {self.spending}"
        return f"{text}. It stopped: {self.stopped}" if self.stopped else text


@dataclass(frozen=True)
class BatchPlan:
    """The plan of a batch. Nothing was started.

    Attributes:
        name: The batch.
        rows: The number of rows that can be run. `done`: how many of them have ended in earlier calls.
        bad: Rows that cannot be run, up to 1,000. `bad_count`: the number of all of them.
        max_in_flight: The number of runs at once.
        seconds, price: The time and the cost to expect; None if they are not known.
    """

    name: str
    rows: int
    done: int
    bad: Sequence[BadRow]
    bad_count: int
    max_in_flight: int
    seconds: float | None
    price: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return to_jsonable_python(asdict(self))

    def __str__(self) -> str:
        remaining = self.rows - self.done
        done = f"{self.done:,} done, {remaining:,} to run" if self.done else f"{remaining:,} to run"
        lines = [f"Batch {self.name}: {self.rows:,} rows, {done}, {self.max_in_flight:,} at a time."]
        listed, more = by_reason(self.bad, self.bad_count)
        lines += [f"{where[:1].upper()}{where[1:]} cannot be run: {reason}." for where, reason in listed]
        if more:
            lines.append(f"And {more:,} more rows that cannot be run.")
        if self.seconds is not None:
            lines.append(f"It takes about {duration(self.seconds)}.")
        if self.price is not None:
            lines.append(f"It costs about {money(self.price)}.")
        return "\n".join(lines)


@dataclass
class BatchProgress:
    """The progress of a batch, with all of its calls so far.

    Attributes:
        name: The batch.
        phase: In `waiting`, no run is in flight, and the crew's concurrency limit has no free slot.
        total: Rows that can be run; 0 while they are checked. `bad`: the bad rows.
        counts: The number of rows by the state of their last attempt, when they were last counted.
        misfits, unfinished: Rows that have completed but count as failed, and rows that failed only here.
        in_flight: Runs in flight. `people`: how many of them wait for a person.
        ended_here: Rows that ended in this call.
        failures, uncertain_keys: The first failed rows, and the keys of the first uncertain ones.
        errors: Failures of this call by the class of their error.
    """

    name: str
    phase: Literal["checking", "waiting", "running", "finishing", "done"] = "checking"
    total: int = 0
    bad: BadRows = field(default_factory=BadRows)
    counts: Mapping[AttemptState | Literal["conflict"] | None, int] = field(default_factory=dict[Any, int])
    misfits: int = 0
    unfinished: int = 0
    in_flight: int = 0
    people: int = 0
    ended_here: int = 0
    started: float = field(default_factory=time.monotonic)
    failures: list[RowEnd] = field(default_factory=list[RowEnd])
    uncertain_keys: list[str] = field(default_factory=list[str])
    errors: Counter[str] = field(default_factory=Counter[str])

    @property
    def completed(self) -> int:
        """Rows that have a result for their inputs."""
        return max(0, self.counts.get(AttemptState.COMPLETED, 0) - self.misfits)

    @property
    def conflicts(self) -> int:
        """Rows that have completed with other inputs."""
        return self.counts.get(CONFLICT, 0)

    @property
    def failed(self) -> int:
        """Rows that have ended without a result, or that this call gave up."""
        on_record = sum(self.counts.get(state, 0) for state in FAILED)
        return on_record + self.conflicts + self.misfits + self.unfinished

    @property
    def uncertain(self) -> int:
        """Rows whose kickoff may or may not have started a run."""
        return self.counts.get(AttemptState.UNCERTAIN, 0)

    @property
    def done(self) -> int:
        """Rows that have ended or are uncertain."""
        return self.completed + self.failed + self.uncertain

    @property
    def whole(self) -> int:
        """All rows of the data set, also those that cannot be run."""
        return self.total + self.bad.count

    @property
    def seconds(self) -> float:
        """The seconds since this call began."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows that end per second, in this call."""
        return self.ended_here / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """The seconds for the remaining rows at this rate; None if no row remains, or no row has ended."""
        rate, remaining = self.rate, self.total - self.done
        return remaining / rate if rate > 0 and remaining > 0 else None

    def add(self, end: RowEnd) -> None:
        """Count a row that has ended in this call, or was found to have."""
        self.ended_here += end.is_new
        self.errors.update([end.kind] if end.kind else [])
        self.misfits += end.state == "invalid-output"
        self.unfinished += end.is_unfinished
        if end.state == "uncertain":
            if len(self.uncertain_keys) < UNCERTAIN_KEYS:
                self.uncertain_keys.append(end.key)
        elif end.state != "completed" and len(self.failures) < FAILURES:
            self.failures.append(end)


OnProgress = Callable[[BatchProgress], None]
"""Called when a batch enters another phase, and about once a second. It must be quick and must not raise."""


class BatchArtifact:
    """The page of one batch: its progress, its failures, and at the end its figures."""

    def __init__(self, name: str, crew: Crew) -> None:
        self._name = name
        self._crew = crew
        self._artifact = MarkdownArtifact(
            artifact_key(name, prefix="batch"), f"Batch {name}", flow_run_id=flow_run_id()
        )
        self._shown_at = 0.0

    async def update(self, progress: BatchProgress, report: BatchReport | None = None) -> None:
        """Show the progress, every few seconds at most, or the report at the end."""
        if report is None and time.monotonic() - self._shown_at < SHOW_EVERY:
            return
        self._shown_at = time.monotonic()
        problems = {"failed": progress.failed, "uncertain": progress.uncertain, "bad": progress.bad.count}
        counts = ", ".join(f"{count:,} {word}" for word, count in problems.items() if count)
        parts = [f"## Batch {prose(self._name)} · {prose(self._crew.label)}{f': {counts}' if counts else ''}"]
        if report is not None and report.stopped:
            parts += ["### Stopped", fenced(report.stopped)]
        parts += [table(("", ""), self._figures(progress, report)), *self._failures(progress)]
        await self._artifact.keep("\n\n".join(parts) + "\n")

    def _failures(self, progress: BatchProgress) -> list[str]:
        parts: list[str] = []
        if progress.uncertain_keys:
            text = ", ".join(code(key) for key in progress.uncertain_keys[:FAILURES])
            command = f"prefect-crew runs resolve {shlex.quote(f'batch/{escape_name(self._name)}/KEY')}"
            parts += [
                "### Uncertain",
                f"Nobody knows whether {progress.uncertain:,} kickoffs started a run. Look at the crew's page, then "
                f"resolve each: {text}",
                commands(f"{command} --kickoff-id ID", f"{command} --never-started"),
            ]
        if progress.failures:
            rows = [
                (
                    code(failure.key),
                    code(failure.kickoff_id) if failure.kickoff_id else "–",
                    cell(failure.state),
                    cell((failure.error or "–") if self._crew.show != "none" else "not shown"),
                )
                for failure in progress.failures
            ]
            name = shlex.quote(self._name)
            again = commands(f"prefect-crew batch failures {name}", f"prefect-crew batch resume {name}")
            parts += ["### Failed", f"The first {len(rows):,} of {progress.failed:,}. To list or to retry all:", again]
            parts.append(table(("Row", "Run", "State", "Error"), rows))
        if (bad := progress.bad).count:
            lines = [(f"{row.line:,}", cell(row.reason)) for row in bad.rows[:FAILURES]]
            text = f"The first {len(lines):,} of {bad.count:,} rows that cannot be run."
            parts += ["### Bad rows", text, table(("Line", "Why"), lines)]
        return parts

    def _figures(self, progress: BatchProgress, report: BatchReport | None) -> list[tuple[str, str]]:
        share = progress.done / progress.whole if progress.whole else 1.0
        full = round(share * BAR)
        bar = f"{'█' * full}{'░' * (BAR - full)} {progress.done:,} of {progress.whole:,} ({share:.1%})"
        counts = {"Completed": progress.completed, "Failed": progress.failed, "Uncertain": progress.uncertain}
        if progress.bad.count:
            counts["Bad"] = progress.bad.count
        rows = [("Done", bar), *((name, f"{count:,}") for name, count in counts.items())]
        if (run := flow_run_id()) is not None:
            rows.append(("Flow run", flow_run_link(run)))
        if self._crew.page_url:
            rows.append(("Crew", link(self._crew.label, self._crew.page_url)))
        if progress.people:
            rows.append(("Wait for a person", f"{progress.people:,} · `prefect-crew reviews ls`"))
        if report is None:
            seconds = progress.seconds_left
            waits = f", {WAITS_FOR_SLOT}" if progress.phase == "waiting" else ""
            return [
                *rows,
                ("In flight", f"{progress.in_flight:,}{waits}"),
                ("Rate", f"{progress.rate:.1f} rows/s"),
                ("Time so far", duration(progress.seconds)),
                ("Time left", "–" if seconds is None else duration(seconds)),
            ]
        rows += [
            ("Not run", f"{report.skipped - report.bad_count:,}"),
            ("Kickoffs of this call", f"{report.kickoffs:,}"),
            ("Time of this call", duration(report.seconds)),
        ]
        rows += [(name.replace("_", " "), f"{count:,}") for name, count in report.usage or () if count is not None]
        if report.cost is not None:
            rows.append(("Cost of all calls", money(report.cost)))
        if (report.usage is not None or report.cost is not None) and report.spending.unknown:
            rows.append(("Unknown", report.spending.unknown))
        return [*rows, ("Export", code(report.export))]
