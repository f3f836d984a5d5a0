"""What a batch came to, and what it would take: for code, for a terminal, for Prefect's page."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefect_crew.api.models import CrewState, TokenUsage
from prefect_crew.artifacts import MarkdownArtifact, artifact_key
from prefect_crew.batches.rows import BadRow
from prefect_crew.logs import run_logger
from prefect_crew.records import RecordPhase, RunRecord
from prefect_crew.rendering import cell, code, duration, prose, table
from prefect_crew.stopping import flow_run_id

__all__ = ["BatchArtifacts", "BatchPlan", "BatchReport", "Standing"]

SHOW_EVERY = 5.0
FAILURES = 100
"""Failed rows that the artifact lists; the output has all."""
SLOWEST = 10
DURATIONS = 100_000
"""Durations that are kept for percentiles."""


@dataclass(frozen=True)
class BatchReport:
    """What a batch came to, earlier calls of the same name included.

    Attributes:
        name: The batch.
        total: Rows that can be run, plus those that were set aside.
        completed, failed, uncertain: How they stand. Uncertain ones wait to be settled by a person.
        skipped: Rows that were not run: set aside, or not reached because the batch stopped buying.
        seconds: The wall time of this call.
        output: Where the lines are.
        stopped: Why the batch stopped buying, None if it did not.
        kickoffs: Runs that this call bought.
        uncertain_keys: The keys of the uncertain rows, up to 1,000.
        errors: Failures of this call by the class of their error.
        usage: The sum of what the server reported, None where it reported nothing.
    """

    name: str
    total: int
    completed: int
    failed: int
    uncertain: int
    skipped: int
    seconds: float
    output: str
    stopped: str | None = None
    kickoffs: int = 0
    uncertain_keys: Sequence[str] = ()
    errors: Mapping[str, int] = field(default_factory=dict[str, int])
    usage: TokenUsage | None = None

    def __str__(self) -> str:
        parts = [f"{self.completed} of {self.total} rows completed"]
        parts += [f"{count} {word}" for word, count in self._rest() if count]
        text = f"Batch {self.name}: {', '.join(parts)} in {duration(self.seconds)}. Output: {self.output}"
        return f"{text}. It stopped: {self.stopped}" if self.stopped else text

    def _rest(self) -> list[tuple[str, int]]:
        return [("failed", self.failed), ("uncertain", self.uncertain), ("not run", self.skipped)]


@dataclass(frozen=True)
class BatchPlan:
    """What a batch would do. Nothing was started. `seconds` and `price` are None where nothing tells them."""

    name: str
    rows: int
    done: int
    bad: Sequence[BadRow]
    bad_count: int
    duplicates: int
    max_in_flight: int
    seconds: float | None
    price: float | None

    def __str__(self) -> str:
        left = self.rows - self.done
        lines = [
            f"Batch {self.name}: {self.rows} rows, {self.done} done, {left} to run, {self.max_in_flight} at a time"
        ]
        if self.duplicates:
            lines.append(f"{self.duplicates} rows equal an earlier one and are left out")
        lines += [f"Line {row.line} cannot be run: {row.reason}" for row in self.bad[:20]]
        if self.bad_count > 20:
            lines.append(f"and {self.bad_count - 20} more that cannot be run")
        if self.seconds is not None:
            lines.append(f"It takes about {duration(self.seconds)}")
        if self.price is not None:
            lines.append(f"It costs about {self.price:g}")
        return "\n".join(lines)


@dataclass
class Standing:
    """How a batch stands while it runs. `durations` are seconds from kickoff to end."""

    total: int
    set_aside: int = 0
    completed: int = 0
    failed: int = 0
    uncertain: int = 0
    in_flight: int = 0
    ended_here: int = 0
    started: float = field(default_factory=time.monotonic)
    durations: list[float] = field(default_factory=list[float])
    failures: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    uncertain_keys: list[str] = field(default_factory=list[str])
    slowest: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    usage: Counter[str] = field(default_factory=Counter[str])
    errors: Counter[str] = field(default_factory=Counter[str])

    @property
    def done(self) -> int:
        """Rows of which nothing more is expected."""
        return self.completed + self.failed + self.uncertain

    @property
    def rate(self) -> float:
        """Rows that ended in this call, a second."""
        return self.ended_here / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate."""
        return (self.total - self.done) / self.rate if self.ended_here else None

    def take(self, key: str, record: RunRecord | None, error: str | None, kind: str | None, *, found: bool) -> None:
        """Take in how a row stands."""
        self.ended_here += not found
        if record is not None and record.phase is RecordPhase.UNCERTAIN:
            self.uncertain += 1
            if len(self.uncertain_keys) < 1000:
                self.uncertain_keys.append(key)
            return
        if error is None and record is not None and record.state is CrewState.COMPLETED:
            self.completed += 1
        else:
            self.failed += 1
            if kind is not None and not found:
                self.errors[kind] += 1
            if len(self.failures) < FAILURES:
                run = "" if record is None or record.kickoff_id is None else record.kickoff_id
                self.failures.append((key, run, error or "failed"))
        if record is not None:
            self._measure(key, record)

    def _measure(self, key: str, record: RunRecord) -> None:
        if record.result is not None and record.result.usage is not None:
            self.usage.update({name: count for name, count in record.result.usage if count is not None})
        if record.kicked_off_at is None or record.ended_at is None:
            return
        seconds = (record.ended_at - record.kicked_off_at).total_seconds()
        if len(self.durations) < DURATIONS:
            self.durations.append(seconds)
        if len(self.slowest) < SLOWEST or seconds > self.slowest[-1][0]:
            self.slowest = sorted([*self.slowest, (seconds, key)], reverse=True)[:SLOWEST]

    @property
    def tokens(self) -> TokenUsage | None:
        """The sum of what the server reported."""
        return TokenUsage(**self.usage) if self.usage else None


class BatchArtifacts:
    """The three artifacts of a batch: progress, failures, summary. They never fail it; trouble is logged once."""

    def __init__(self, name: str, crew: str) -> None:
        self._name = name
        self._crew = crew
        own = flow_run_id()
        self._parts = {
            part: MarkdownArtifact(
                artifact_key(f"{name}-{part}", prefix="batch"), f"{part.title()} of batch {name}", flow_run_id=own
            )
            for part in ("progress", "failures", "summary")
        }
        self._shown_at = 0.0
        self._troubled = False

    async def progress(self, standing: Standing) -> None:
        """Show progress, every few seconds at most."""
        if time.monotonic() - self._shown_at < SHOW_EVERY:
            return
        self._shown_at = time.monotonic()
        await self._put("progress", self._progress(standing))

    async def end(self, standing: Standing, report: BatchReport, price: float | None) -> None:
        """Show all three as they stand at the end."""
        await self._put("progress", self._progress(standing))
        await self._put("failures", self._failures(standing))
        await self._put("summary", self._summary(standing, report, price))

    async def _put(self, part: str, data: str) -> None:
        trouble = await self._parts[part].put(data)
        if trouble and not self._troubled:
            self._troubled = True
            run_logger().warning("The artifacts of batch %s could not be updated: %s", self._name, trouble)

    def _head(self, what: str) -> str:
        return f"## {what} of batch {prose(self._name)} · {prose(self._crew)}"

    def _progress(self, standing: Standing) -> str:
        share = standing.done / standing.total if standing.total else 1.0
        left = standing.seconds_left
        rows = [
            ("Done", f"{standing.done:,} of {standing.total:,} ({share:.1%})"),
            ("Completed", f"{standing.completed:,}"),
            ("Failed", f"{standing.failed:,}"),
            ("Uncertain", f"{standing.uncertain:,}"),
            ("In flight", f"{standing.in_flight:,}"),
            ("Rate", f"{standing.rate:.1f} rows/s"),
            ("Time left", "–" if left is None else duration(left)),
        ]
        return f"{self._head('Progress')}\n\n{table(('', ''), rows)}\n"

    def _failures(self, standing: Standing) -> str:
        if not standing.failures and not standing.uncertain_keys:
            return f"{self._head('Failures')}\n\nNone.\n"
        parts = [self._head("Failures")]
        if standing.uncertain_keys:
            shown = ", ".join(code(key) for key in standing.uncertain_keys[:FAILURES])
            parts.append(f"**Uncertain**, to be settled by a person ({standing.uncertain:,}): {shown}")
        if standing.failures:
            rows = [(code(key), code(run) if run else "–", cell(error)) for key, run, error in standing.failures]
            parts += [f"The first {len(rows):,} of {standing.failed:,}:", table(("Row", "Run", "Error"), rows)]
        return "\n\n".join(parts) + "\n"

    def _summary(self, standing: Standing, report: BatchReport, price: float | None) -> str:
        rows = [
            ("Rows", f"{report.total:,}"),
            ("Completed", f"{report.completed:,}"),
            ("Failed", f"{report.failed:,}"),
            ("Uncertain", f"{report.uncertain:,}"),
            ("Not run", f"{report.skipped:,}"),
            ("Kickoffs in this call", f"{report.kickoffs:,}"),
            ("Time of this call", duration(report.seconds)),
        ]
        if standing.durations:
            marks = statistics.quantiles(standing.durations, n=100) if len(standing.durations) > 1 else None
            if marks is not None:
                rows += [(f"Duration p{mark}", duration(marks[mark - 1])) for mark in (50, 90, 99)]
        if report.usage is not None:
            rows += [(name.replace("_", " "), f"{count:,}") for name, count in report.usage if count is not None]
        if price is not None:
            rows.append(("Cost of this call", f"{price * report.kickoffs:g}"))
        if report.stopped:
            rows.append(("Stopped", cell(report.stopped)))
        rows.append(("Output", code(report.output)))
        parts = [self._head("Summary"), table(("", ""), rows)]
        if standing.slowest:
            slow = [(code(key), duration(seconds)) for seconds, key in standing.slowest]
            parts += ["### Slowest rows", table(("Row", "Time"), slow)]
        return "\n\n".join(parts) + "\n"
